"""What becomes of a trained classifier: exported for other tools, judged on its test images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mars_lab.cli import main
from mars_lab.evaluation import images as image_results
from mars_lab.evaluation.images import ImageResults
from mars_lab.evaluation.new_folder import new_folder
from mars_lab.models import images
from mars_lab.models.images import ImageModelConfig
from mars_lab.recipes.registry import find
from mars_lab.tasks.vision import VisionConfig, VisionTask
from mars_lab.training import launch, run_folder
from mars_lab.training.config import RunConfig
from mars_lab.training.loop import train
from mars_lab.training.run_folder import RunFolder

from .tiny_runs import flags


@pytest.fixture
def run(tmp_path: Path, tiny_vision: RunConfig) -> RunFolder:
    task, folder = launch.start(tiny_vision, tmp_path / "runs", "classifier", numbered=False)
    train(task, tiny_vision, folder, quiet=True)
    return folder


def normalised(pixels: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    mean, std = (torch.tensor(config["normalisation"][name])[:, None, None] for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def failure(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_an_exported_folder_is_all_it_takes(run: RunFolder, tiny_vision: RunConfig, tmp_path: Path) -> None:
    """Read with safetensors and json alone, the model gives its own logits and the accuracy of its run."""
    main(["export", str(tmp_path / "out"), str(run.path), "--to", "safetensors"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dataset"], config["classes"][3], len(config["classes"])) == ("cifar10", "cat", 10)
    rebuilt = images.build(ImageModelConfig(**config["architecture"]), len(config["classes"])).eval()
    rebuilt.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert isinstance(tiny_vision.task, VisionConfig)
    task = VisionTask(tiny_vision.task, seed=0)
    original = launch.load_weights(task, launch.newest_checkpoint(run)).eval()
    x = normalised(torch.from_numpy(task.data.test.pixels), config)
    with torch.no_grad():
        logits = rebuilt(x)
        assert torch.equal(logits, original(x))
    right = (logits.argmax(1) == torch.from_numpy(task.data.test.labels)).float().mean().item()
    summary = run.summary()
    assert summary is not None
    assert right == pytest.approx(summary["val_accuracy"])


def test_an_evaluation_is_the_runs_own_and_says_what_is_taken_for_what(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["evaluate", str(run.path)])
    out, summary = capsys.readouterr().out, run.summary()
    folder = run.path / "evaluation" / "step-00000030"
    values = json.loads((folder / "results.json").read_text())
    assert summary is not None
    assert values["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert values["accuracy"] == pytest.approx(summary["val_accuracy"])
    assert (values["num_images"], values["published"]) == (50, None)
    confusion, labels = torch.tensor(values["confusion"]), find_labels(run)
    assert confusion.sum(1).tolist() == torch.bincount(labels, minlength=10).tolist()
    for index, name in enumerate(values["classes"]):
        row = confusion[index]
        assert values["accuracy_by_class"][name] == pytest.approx(row[index].item() / max(1, row.sum().item()))
    assert f"| {summary['val_accuracy']:.2%} |" in out
    assert f"| {' | '.join(('cat', *map(str, values['confusion'][3])))} |" in (folder / "results.md").read_text()
    main(["evaluate", str(run.checkpoints / "step-00000020"), "--limit", "20", "--batch-size", "7"])
    earlier = json.loads((run.path / "evaluation" / "step-00000020-limit-20" / "results.json").read_text())
    assert earlier["num_images"] == 20
    assert not (run.path / "evaluation" / "step-00000020").exists()


def find_labels(run: RunFolder) -> torch.Tensor:
    task = launch.prepare(run.config())
    assert isinstance(task, VisionTask)
    return torch.from_numpy(task.data.test.labels).long()


def test_the_published_figure_stands_beside_a_run_of_that_recipe_alone() -> None:
    config = find("cifar10-resnet18-mars-adamw").config
    steps = config.train.num_steps
    figure = image_results._published(config, steps)
    assert figure is not None
    assert (figure.loss, figure.accuracy) == (0.199, 95.29)
    assert image_results._published(config, steps // 2) is None
    assert image_results._published(find("cpu/cifar10-resnet18-mars-adamw").config, steps) is None
    results = ImageResults("run", "cifar10", ("cat", "dog"), 0.5, [[3, 1], [0, 4]], figure)
    assert "| published: MARS paper: ResNet-18, cifar10, 200 epochs | 10,000 | 0.199 | 95.29% |" in results.tables()
    assert "| run | 8 | 0.5000 | 87.50% |" in results.tables()


def test_folders_filled_at_once_do_not_mix_and_failures_leave_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as first:
        (first / "a").touch()
        with pytest.raises(IsADirectoryError), new_folder(tmp_path / "out") as second:
            second.joinpath("b").write_bytes(second.read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_hundred_classes_have_no_table_of_confusion() -> None:
    names, counts = [f"class {i}" for i in range(100)], torch.eye(100, dtype=torch.int64).tolist()
    results = ImageResults("run", "cifar100", names, 0.5, counts, None)
    assert "taken for |" in results.tables()
    assert "is \\ taken for" not in results.tables()
    assert len(results.values()["confusion"]) == 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evaluate", "run", "--tasks", "books"], "--tasks is for language models; leave it out: an image classifier"),
        (["evaluate", "run", "--books=x.jsonl"], "--books is for language models"),
        (["evaluate", "run", "--num_passages", "9"], "--num-passages is for language models"),
        (["evaluate", "run", "--device", "nonsense"], "--device nonsense can't be used"),
        (["export", "out", "run", "--to", "hf"], "model is resnet18; an image classifier is judged by `mars evaluate"),
        (["sample", "run"], "exported by `mars export FOLDER RUN --to safetensors`"),
    ],
)
def test_what_is_for_text_is_refused(
    args: list[str], message: str, tmp_path: Path, tiny_vision: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    task, folder = launch.start(tiny_vision, tmp_path, "run", numbered=False)
    model = task.build_model()
    folder_with_weights(folder, model)
    args = [str(tmp_path / arg) if arg in ("run", "out") else arg for arg in args]
    assert message in failure(capsys, *args)
    assert not (tmp_path / "out").exists()


def folder_with_weights(folder: RunFolder, model: torch.nn.Module) -> None:
    from mars_lab.ranks import Ranks
    from mars_lab.training.checkpoint import contents
    from mars_lab.training.checkpoint.contents import Contents
    from mars_lab.training.checkpoint.saver import Saver

    with Saver(folder.checkpoints, Ranks(), num_kept=1) as saver:
        values = {"step": 0, "param_groups": [], "tied": contents.tied_names(model)}
        saver.save(0, Contents(contents.model_tensors(model), values))


def test_a_language_model_is_no_classifier(tmp_path: Path, tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *flags(tiny), "--train.num-steps", "1", "--name", "text", "--runs", str(tmp_path)])
    run = run_folder.find(tmp_path, "text")
    message = failure(capsys, "export", tmp_path / "out", run.path, "--to", "safetensors")
    assert "--to safetensors is for image classifiers" in message
    assert message.endswith("trains a language model: --to hf")
