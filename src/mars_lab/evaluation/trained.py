"""A trained model from wherever a person has it: a run, one of its checkpoints, a folder of Hugging Face."""

from dataclasses import dataclass
from pathlib import Path

from mars_lab.data.tokenizer import Tokenizer
from mars_lab.evaluation import hf_folder
from mars_lab.models.gpt2 import GPT2
from mars_lab.training import launch, run_folder
from mars_lab.training.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """A model and the tokenizer it was trained with."""

    model: GPT2
    tokenizer: Tokenizer

    def write(self, path: Path) -> None:
        """Make `path` a folder for `transformers`; see `hf_folder.write`."""
        hf_folder.write(path, self.model, self.tokenizer)


def load(runs: Path, name: str | None) -> Trained:
    """The model of the run `name` (see `run_folder.find`), or of one of a run's checkpoints.

    Raises:
        InputError: there is no such run, or no readable checkpoint.
    """
    checkpoint = Path(name) if name is not None and _is_checkpoint(Path(name)) else None
    folder = run_folder.find(runs, name) if checkpoint is None else RunFolder(checkpoint.parent.parent)
    task, model = launch.load_model(folder, checkpoint)
    return Trained(model, task.data.tokenizer)


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith("step-") and (path.parent.parent / "config.json").is_file() and path.is_dir()
