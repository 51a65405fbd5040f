"""A trained model of a run: its newest checkpoint, or a certain one."""

from dataclasses import dataclass
from pathlib import Path

from mars_lab.data.tokenizer import Tokenizer
from mars_lab.errors import InputError
from mars_lab.evaluation import hf_folder
from mars_lab.models.gpt2 import GPT2
from mars_lab.training import launch, run_folder
from mars_lab.training.checkpoint import folder as folders
from mars_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A model, the tokenizer it was trained with, and where it comes from."""

    model: GPT2
    tokenizer: Tokenizer
    run: RunFolder
    checkpoint: Path

    def write(self, path: Path) -> None:
        """Make `path` a folder for `transformers`; see `hf_folder.write`."""
        hf_folder.write(path, self.model, self.tokenizer)


def load(runs: Path, name: str | None) -> Trained:
    """The model of the run `name` (see `run_folder.find`), or, if it is the path of one, of a checkpoint of a run.

    Raises:
        InputError: there is no such run, or no readable checkpoint.
    """
    if name is not None and _is_checkpoint(Path(name)):
        checkpoint = Path(name).resolve()
        run = RunFolder(checkpoint.parent.parent)
        if (problem := folders.problem(checkpoint)) is not None:
            raise InputError(f"the checkpoint {checkpoint} is damaged ({problem}); give another, or the run {run.path}")
    else:
        run = run_folder.find(runs, name)
        checkpoint = launch.newest_checkpoint(run)
    task, model = launch.load_model(run, checkpoint)
    return Trained(model, task.data.tokenizer, run, checkpoint)


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith("step-") and (path.parent.parent / "config.json").is_file() and path.is_dir()
