"""Readers of CIFAR, augmentation, the classifiers, and a run to the end; on images made up here."""

import dataclasses
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from images_at_hand import REAL, archive_files, made_up, write_folder, write_jpegs
from mars_lab.cli import main
from mars_lab.data import cifar
from mars_lab.data.augmentation import AugmentedImages, packed, unpacked
from mars_lab.data.cifar import LabelledImages
from mars_lab.errors import InputError
from mars_lab.models import images
from mars_lab.models.images import ImageModelConfig
from mars_lab.ranks import Ranks
from mars_lab.report.rows import read_rows
from mars_lab.tasks.vision import VisionConfig, VisionTask
from mars_lab.training import launch
from mars_lab.training.checkpoint import plain
from mars_lab.training.config import RunConfig
from mars_lab.training.loop import train
from mars_lab.training.run_folder import RunFolder
from mars_optim import param_groups

from .forked import run_ranks


def same(found: LabelledImages, expected: LabelledImages) -> bool:
    return np.array_equal(found.pixels, expected.pixels) and np.array_equal(found.labels, expected.labels)


@pytest.mark.parametrize(("dataset", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_official_archives_packed_and_unpacked(tmp_path: Path, dataset: Any, num_classes: int) -> None:
    files, train_part, test_part = archive_files(num_classes)
    inner = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[dataset]
    tar_name = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[dataset]
    write_folder(tmp_path / "unpacked" / inner, files)
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / tar_name, "w:gz") as tar:
        tar.add(tmp_path / "unpacked" / inner, inner)
    sources = ("unpacked", f"unpacked/{inner}", "packed", f"packed/{tar_name}")
    for source in sources:
        found = cifar.load(dataset, tmp_path / source)
        assert same(found.train, train_part)
        assert same(found.test, test_part)
        assert len(found.class_names) == num_classes


def test_an_archive_of_numpy_1_is_read(tmp_path: Path) -> None:
    files, train_part, _ = archive_files(10)
    assert b"numpy._core" in files["test_batch"] or b"numpy.core" in files["test_batch"]
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    write_folder(tmp_path / "old", {name: content.replace(new, old) for name, content in files.items()})
    assert same(cifar.load("cifar10", tmp_path / "old").train, train_part)


def test_jpeg_images_are_nearly_the_originals(tmp_path: Path) -> None:
    train_part, test_part = made_up(12), made_up(7, seed=1)
    write_jpegs(tmp_path, train_part, test_part)
    found = cifar.load("cifar10", tmp_path)
    assert np.abs(found.train.pixels.astype(int) - train_part.pixels).max() < 8
    assert found.test.labels.tolist() == test_part.labels.tolist()


class _Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_what_is_not_cifar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"no cifar10 at .*put cifar-10-python\.tar\.gz there"):
        cifar.load("cifar10", tmp_path / "nothing")
    files, *_ = archive_files(10)
    write_folder(tmp_path / "evil", files | {"test_batch": pickle.dumps({b"data": _Code()})})
    with pytest.raises(InputError, match=r"asks for builtins\.print"):
        cifar.load("cifar10", tmp_path / "evil")
    assert "run" not in capsys.readouterr().out, "nothing in a pickle is executed"
    write_folder(tmp_path / "torn", files | {"test_batch": files["test_batch"][:100]})
    with pytest.raises(InputError, match="restore it"):
        cifar.load("cifar10", tmp_path / "torn")
    write_jpegs(tmp_path / "hundred", made_up(9, 100), made_up(9, 100))
    with pytest.raises(InputError, match=r"has 10 classes; --data\.dataset says which"):
        cifar.load("cifar10", tmp_path / "hundred")


def test_batches_hold_every_image_once_an_epoch_and_depend_on_the_position_alone() -> None:
    part = LabelledImages(made_up(30).pixels, np.arange(30, dtype=np.uint8))
    source = AugmentedImages(part, seed=3)
    whole = source.sequences(0, 90)
    pieces = torch.cat([source.sequences(first, 7) for first in range(0, 84, 7)])
    assert torch.equal(whole[:84], pieces)
    epochs = [unpacked(whole[first : first + 30])[1].tolist() for first in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert not torch.equal(whole, AugmentedImages(part, seed=4).sequences(0, 90))


def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, size=(1, 3, 32, 32)).astype(np.uint8)
    source = AugmentedImages(LabelledImages(pixels, np.zeros(1, np.uint8)), seed=0)
    padded = np.zeros((3, 40, 40), np.uint8)
    padded[:, 4:36, 4:36] = pixels[0]
    crops = {
        padded[:, y : y + 32, x : x + 32][:, :, :: -1 if mirrored else 1].tobytes(): (y, x, mirrored)
        for y in range(9)
        for x in range(9)
        for mirrored in (False, True)
    }
    moved, _ = unpacked(source.sequences(0, 2000))
    seen = [crops[np.ascontiguousarray(image).tobytes()] for image in moved.numpy()]
    assert len(set(seen)) == 162, "every shift, both ways round"
    assert abs(sum(mirrored for *_, mirrored in seen) / 2000 - 0.5) < 0.05


def test_resnet18_has_the_size_of_resnet18() -> None:
    model = images.build(ImageModelConfig("resnet18"), 10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # 11.17M: the CIFAR form with ten classes
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    cnn = images.build(ImageModelConfig("cnn", width=32, dropout=0.2), 100)
    assert cnn(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("mars_type", ["m", "shampoo"])
def test_convolutions_are_matrices_and_the_head_is_not(mars_type: Any) -> None:
    model = images.build(ImageModelConfig("resnet18", width=4), 10)
    audit = str(param_groups(model, mars_type, lr=1e-3).audit)
    lines = {line.split()[0]: line for line in audit.splitlines() if line.split()}
    assert "convolution as (out, in*kernel)" in lines["stages.1.0.conv1.weight"]
    assert "head" in lines["head.weight"]
    assert "convolution" not in lines["bn1.weight"]


def test_a_run_learns_measures_and_continues_bit_for_bit(tmp_path: Path, tiny_vision: RunConfig) -> None:
    task, straight = launch.start(tiny_vision, tmp_path, "straight", numbered=False)
    summary = train(task, tiny_vision, straight, quiet=True)
    rows = [row for row in read_rows(straight.metrics) if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    # Chance is 0.1; six seeds end between 0.38 and 0.6, and processors differ.
    assert summary["val_accuracy"] == rows[-1]["val_accuracy"] > 0.3 > rows[0]["val_accuracy"]
    assert 0 <= rows[-1]["train_accuracy"] <= 1
    assert summary["tokens"] == 600
    assert (straight.path / "loss.png").stat().st_size > 0
    assert (straight.path / "sample.txt").read_text().splitlines()[1].startswith("airplane")
    main(["report", str(straight.path), "--out", str(tmp_path / "report")])
    assert "| images/s |" in (tmp_path / "report" / "results.md").read_text()
    _, again = launch.start(tiny_vision, tmp_path, "again", numbered=False)
    plain.export(straight.checkpoints, tmp_path / "end.pt")
    for checkpoint in straight.checkpoints.iterdir():
        if checkpoint.name.endswith("20"):
            checkpoint.rename(_made(again.checkpoints) / checkpoint.name)
    assert launch.resume(again, quiet=True)["val_loss"] == summary["val_loss"]
    end, wanted = plain.read_newest(again.checkpoints), torch.load(tmp_path / "end.pt", weights_only=True)
    assert end is not None
    for name, value in wanted["model"].items():
        assert torch.equal(end["model"][name], value), name


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_evaluation_is_the_mean_over_all_images(tiny_vision: RunConfig) -> None:
    assert isinstance(tiny_vision.task, VisionConfig)
    task = VisionTask(tiny_vision.task, seed=0)
    model = task.build_model()
    measures = task.evaluate(model, Ranks())
    model.eval()
    pixels = torch.from_numpy(task.data.test.pixels).float() / 255
    mean, deviation = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    logits = model((pixels - mean[:, None, None]) / deviation[:, None, None])
    labels = torch.from_numpy(task.data.test.labels).long()
    assert measures["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert measures["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    rows = packed(task.data.test)
    assert task.loss(model, rows).item() == pytest.approx(measures["val_loss"], rel=1e-4)


def test_what_classifiers_cannot_do(tmp_path: Path, tiny_vision: RunConfig) -> None:
    assert isinstance(tiny_vision.task, VisionConfig)
    task, folder = launch.start(tiny_vision, tmp_path, "run", numbered=False)
    with pytest.raises(InputError, match="use --parallel ddp"):
        task.layers(task.build_model())
    with pytest.raises(InputError, match="--parallel tp is not for image classifiers"):
        dataclasses.replace(tiny_vision, train=dataclasses.replace(tiny_vision.train, parallel="tp"))
    with pytest.raises(InputError, match="needs a language model, but the run's model is resnet18"):
        launch.load_model(folder, folder.checkpoints / "step-00000000")
    with pytest.raises(InputError, match=r"model\.dropout is for model\.name=cnn"):
        ImageModelConfig("resnet18", dropout=0.1)


def outcome_of(config: RunConfig, runs: Path) -> dict[str, Any]:
    return launch.join(config, runs, "shared")


def test_two_processes_train_one_classifier(tmp_path: Path, tiny_vision: RunConfig) -> None:
    """Both judge the model with the batch statistics of the first, which are those of the checkpoint."""
    first, second = run_ranks(outcome_of, 2, tiny_vision, tmp_path)
    assert isinstance(tiny_vision.task, VisionConfig)
    task = VisionTask(tiny_vision.task, seed=0)
    model = task.build_model()
    end = plain.read_newest(RunFolder(tmp_path / "shared").checkpoints)
    assert end is not None
    model.load_state_dict(end["model"])
    assert task.evaluate(model, Ranks())["val_loss"] == pytest.approx(first["val_loss"], rel=1e-5)
    assert first["val_loss"] == second["val_loss"]
    assert first["val_accuracy"] > 0.2
    assert first["tokens"] == 600


@pytest.mark.skipif(not REAL.is_dir(), reason="no copy of CIFAR-10 in ../shared/data/cifar10")
def test_the_real_images_from_training_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    few = ["--data.path", str(REAL), "--eval-images", "500", "--eval-train-images", "100", "--train.num-steps", "60"]
    for optimizer in ("adamw", "mars-m"):
        main(["train", f"cpu/cifar10-cnn-{optimizer}", *few, "--train.eval-every", "30", *runs])
    assert "accuracy" in capsys.readouterr().out
    main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "report")])
    out = capsys.readouterr().out
    assert "images/s" in out
    assert "images to adamw's loss" in out
    summary = RunFolder(tmp_path / "runs" / "cpu-cifar10-cnn-mars-m-001").summary()
    assert summary is not None
    assert summary["val_accuracy"] > 0.2, "chance is 0.1"
    data = cifar.load("cifar10", REAL)
    assert (len(data.train.labels), len(data.test.labels)) == (50_000, 10_000)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
