"""EleutherAI's lm-evaluation-harness, on a folder that `transformers` loads."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mars_lab.errors import InputError

_PACKAGES = ("lm_eval", "transformers", "accelerate")
_SEED = 1234
"""Of the choice of few-shot examples; the harness's own default."""


def tasks_path() -> Path:
    """The folder of the tasks that come with the harness.

    Raises:
        InputError: it isn't installed.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"mars evaluate needs the package {package}: pip install 'mars-optim[eval]'")
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


class Harness:
    """A model, ready to answer; `answers` is a file (without its ending) that keeps what it has answered so far."""

    def __init__(self, model: Path, answers: Path, *, device: str, batch_size: int) -> None:
        import datasets
        from lm_eval.api.model import CachingLM
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        datasets.disable_progress_bars()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        network: Any = AutoModelForCausalLM.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        wrap: Any = HFLM  # its decorators hide its arguments from type checkers
        lm = wrap(pretrained=network.to(device), tokenizer=tokenizer, batch_size=batch_size)
        self._lm: Any = CachingLM(lm, f"{answers}.sqlite")

    def __call__(
        self, tasks: Sequence[str], folders: Sequence[Path], *, num_shots: int, limit: int | None
    ) -> dict[str, dict[str, float]]:
        """Metrics of each of `tasks`, which are defined below `folders`, with the number of questions.

        Raises:
            InputError: a task is unknown, or its data are neither here nor on the Hub.
        """
        from lm_eval import evaluate

        loaded = load(tasks, folders)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=num_shots)
            task.set_fewshot_seed(seed=_SEED)
        try:
            results: Any = evaluate(self._lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        except AssertionError:  # the harness's own check; it has no message
            raise InputError(
                f"a question of {', '.join(tasks)} has an answer that is longer than the {self._lm.max_length} tokens "
                "of the model's context; leave that task out, or take a model with a longer context"
            ) from None
        return {name: _metrics(results, name) for name in tasks}

    def close(self) -> None:
        """Write what is still to be written of the answers."""
        self._lm.dbdict.close()


def load(tasks: Sequence[str], folders: Sequence[Path]) -> Any:
    """The harness's tasks, with their questions.

    Raises:
        InputError: a task is unknown, or its data are neither here nor on the Hub.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=False, include_path=list(folders))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        manager = TaskManager(include_path=list(folders))  # takes seconds: thousands of files
        if unknown := [name for name in unknown if name not in manager.all_tasks]:
            raise InputError(
                f"no task {unknown[0]!r} in lm-evaluation-harness; its command `lm-eval ls tasks` lists all"
            )
    try:
        return manager.load(list(tasks))
    except Exception as error:  # Whatever the network, the Hub or a cache has to say.
        raise InputError(
            f"the questions of {', '.join(tasks)} can't be loaded ({type(error).__name__}: {str(error)[:200]}); where "
            "there is no network, give their files with --data FOLDER, or set HF_HOME to a cache that has them"
        ) from None


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    """Without the name of the filter, of which these tasks have one."""
    values = results["results"].get(name) or results["groups"][name]
    metrics = {
        key.partition(",")[0]: value
        for key, value in values.items()
        if isinstance(value, float | int) and "," in key and "stderr" not in key
    }
    return {**metrics, "num_questions": _num_questions(results, name)}


def _num_questions(results: dict[str, Any], name: str) -> int:
    if name in results["n-samples"]:
        return results["n-samples"][name]["effective"]
    return sum(_num_questions(results, child) for child in results["group_subtasks"][name])
