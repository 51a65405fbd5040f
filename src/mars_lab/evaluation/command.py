"""`mars evaluate`: a trained model on the tasks of the field and on held-out books."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from mars_lab.errors import InputError
from mars_lab.evaluation import book_tasks, harness, hf_folder, images, trained
from mars_lab.evaluation.results import Results
from mars_lab.evaluation.suite import BY_NAME, NINE
from mars_lab.evaluation.task_folder import CONTINUATION, LAST_WORD, TaskFolder
from mars_lab.tasks.vision import VisionConfig
from mars_lab.training.run_folder import RunFolder

_NINE, _BOOKS = "nine", "books"
_Found = tuple[RunFolder, Path]
_OF_TEXT = ("--tasks", "--shots", "--data", "--books", "--num-passages")
"""Flags that mean nothing for a classifier."""
NINE_TASKS, BOOK_TASKS = tuple(task.name for task in NINE), (LAST_WORD, CONTINUATION)
_GROUPS = {_NINE: NINE_TASKS, _BOOKS: BOOK_TASKS}


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate a language model with lm-evaluation-harness, or an image classifier on its test images.

    The same command again continues. Of the options below, a classifier takes --limit, --batch-size, --device, --output
    and --runs.
    """

    model: tyro.conf.Positional[str | None] = None
    """Name or folder of a run, by default the one that was started last; one of a run's checkpoints; or a folder that
    transformers loads."""
    tasks: tuple[str, ...] = (_NINE,)
    """`nine`: ARC-E, ARC-C, BoolQ, HellaSwag, OBQA, PIQA, WinoGrande, MMLU, SciQ. `books`: last_word and continuation,
    made from --books. Or names of tasks: these, or any other of the harness."""
    shots: tuple[int, ...] = (0,)
    """Numbers of solved examples before each question; the papers have 0. Tasks from books have none."""
    data: Path | None = None
    """Folder with a folder for each of the nine tasks, with their files; None means the Hugging Face Hub."""
    books: Path | None = None
    """Held-out books: JSON lines with a key `text`. Of a folder, files whose names begin with `train` are left out."""
    num_passages: int = 500
    """Most questions of each task from books."""
    limit: int | None = None
    """Only so many questions of each task, or test images, for a quick look."""
    batch_size: int | None = None
    """Questions (by default 16) or images (500) at once; it changes memory and time alone."""
    device: str = "auto"
    """auto: cuda if there is one, otherwise cpu."""
    output: Path | None = None
    """Folder of the results; by default `evaluation` and the step (and --limit), in the run's folder."""
    runs: Path = Path("runs")
    """Folder of the runs."""

    def __post_init__(self) -> None:
        positive = {"--num-passages": self.num_passages, "--limit": self.limit, "--batch-size": self.batch_size}
        for flag, value in positive.items():
            if value is not None and value < 1:
                raise InputError(f"{flag} must be at least 1, got {value}")
        if not self.tasks or not self.shots or min(self.shots) < 0:
            raise InputError(
                f"give at least one of --tasks and of --shots, none below 0; got {self.tasks}, {self.shots}"
            )

    @property
    def names(self) -> list[str]:
        """Tasks, each once, groups spelled out."""
        return list(dict.fromkeys(name for group in self.tasks for name in _GROUPS.get(group, (group,))))

    @property
    def chosen_device(self) -> str:
        """`auto` replaced by what this machine has.

        Raises:
            InputError: there is no such device here.
        """
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # the second is what a torch without CUDA raises
            raise InputError(
                f"--device {self.device} can't be used ({str(error).splitlines()[0]}); give cpu, cuda or auto"
            ) from None
        return self.device


def main(args: list[str]) -> None:
    """Run `mars evaluate` with `args`."""
    command = tyro.cli(EvaluateCommand, args=args, prog="mars evaluate")
    found = _found(command)
    if found is not None and isinstance(found[0].config().task, VisionConfig):
        results, output = _judge_images(command, args, *found)
    else:
        results, output = _ask(command, found)
    print(f"{results.tables()}\n\nIn {output}: results.json, results.md.")


def evaluate(command: EvaluateCommand) -> tuple[Results, Path]:
    """Ask a language model what it hasn't been asked yet; the results, and the folder they are in.

    Raises:
        InputError: a model, a task or its data can't be used.
    """
    return _ask(command, _found(command))


def check(command: EvaluateCommand) -> None:
    """What can be seen of `command` before there is a model.

    Raises:
        InputError: the harness isn't installed, or questions are not there.
    """
    with TemporaryDirectory(prefix="mars-evaluate-") as scratch:
        harness.load(command.names, _task_folders(command, Path(scratch)))


def _found(command: EvaluateCommand) -> _Found | None:
    """A run and its checkpoint; None for a folder that transformers loads."""
    if command.model is not None and hf_folder.is_hf_folder(Path(command.model)):
        return None
    return trained.located(command.runs, command.model)


def _ask(command: EvaluateCommand, found: _Found | None) -> tuple[Results, Path]:
    with TemporaryDirectory(prefix="mars-evaluate-") as scratch:
        work = Path(scratch)
        folders = _task_folders(command, work)
        model, label, output = _model(command, found, work / "model")
        results = _evaluate(command, model, Results(output, label, _about(command, model)), folders, output)
    return results, output


def _judge_images(
    command: EvaluateCommand, args: list[str], run: RunFolder, checkpoint: Path
) -> tuple[images.ImageResults, Path]:
    given = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    if foreign := [flag for flag in given if flag in _OF_TEXT]:
        raise InputError(
            f"{foreign[0]} is for language models; leave it out: an image classifier is judged on the test images of "
            "its data set"
        )
    changes = {"eval_images": command.limit or 0, "eval_train_images": 0}
    if command.batch_size is not None:
        changes["eval_batch_size"] = command.batch_size
    results = images.judge(trained.load_classifier(run, checkpoint, **changes), command.chosen_device)
    output = _output(command, run.path / "evaluation" / checkpoint.name)
    results.write(output)
    return results, output


def _model(command: EvaluateCommand, found: _Found | None, exported: Path) -> tuple[Path, str, Path]:
    """A folder of Hugging Face, a name, and where results go; `found` is a run's checkpoint, None such a folder."""
    if found is None:
        assert command.model is not None
        folder, label = Path(command.model), Path(command.model).resolve().name
        output = _output(command, Path("evaluation") / label)
    else:
        run, checkpoint = found
        trained.load(run, checkpoint).write(exported)
        folder, label = exported, f"{run.path.name} {checkpoint.name}"
        output = _output(command, run.path / "evaluation" / checkpoint.name)
    output.mkdir(parents=True, exist_ok=True)
    return folder, label, output


def _output(command: EvaluateCommand, default: Path) -> Path:
    """Where results go; a quick look never stands in the place of all questions."""
    quick = default if command.limit is None else default.with_name(f"{default.name}-limit-{command.limit}")
    return command.output or quick


def _about(command: EvaluateCommand, model: Path) -> dict[str, str | int | None]:
    digest = hashlib.sha256()
    for path in sorted(file for file in model.iterdir() if file.suffix in (".safetensors", ".json", ".txt")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"model": digest.hexdigest(), "limit": command.limit}


def _task_folders(command: EvaluateCommand, work: Path) -> list[Path]:
    """Where the tasks are defined: those made from local files, in `work`, and the harness's own."""
    own_tasks = harness.tasks_path()
    folder = TaskFolder(work / "tasks", own_tasks)
    folder.path.mkdir()
    local = _write_tasks(command, folder)
    return [
        folder.path,
        *(own_tasks / BY_NAME[n].folder for n in command.names if n in BY_NAME and n not in local),
    ]


def _write_tasks(command: EvaluateCommand, folder: TaskFolder) -> set[str]:
    """Write the tasks that are made from local files, and return their names.

    Raises:
        InputError: a file is missing or damaged.
    """
    local = {name for name in command.names if name in BOOK_TASKS}
    if local and command.books is None:
        raise InputError(f"{min(local)} is made from held-out books; give their file or folder with --books")
    if command.books is not None and local:
        books = list(book_tasks.held_out_books(command.books))
        makers = {LAST_WORD: book_tasks.last_words, CONTINUATION: book_tasks.continuations}
        for name in sorted(local):
            folder.add_book_task(name, makers[name](books, command.num_passages))
    if command.data is not None:
        for name in [name for name in command.names if name in BY_NAME]:
            folder.add_suite_task(BY_NAME[name], command.data / name, num_shots=max(command.shots))
            local.add(name)
    return local


def _evaluate(
    command: EvaluateCommand, model: Path, results: Results, folders: Sequence[Path], output: Path
) -> Results:
    answers = output / f"answers-{results.values['model'][:12]}"
    evaluate = harness.Harness(model, answers, device=command.chosen_device, batch_size=command.batch_size or 16)
    try:
        for num_shots in sorted(set(command.shots)):
            names = command.names if num_shots == 0 else [n for n in command.names if n not in BOOK_TASKS]
            if names:
                print(f"{num_shots}-shot: {', '.join(names)}", flush=True)
                results.add(num_shots, evaluate(names, folders, num_shots=num_shots, limit=command.limit))
    except KeyboardInterrupt:
        print("\nThe same command again continues.", file=sys.stderr)
        raise
    finally:
        evaluate.close()
    return results
