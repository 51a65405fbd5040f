"""CIFAR for tests: the real images where this machine has them, and made-up ones in the same formats."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mars_lab.data.cifar import LabelledImages

REAL = Path(__file__).parents[1] / ".." / "shared" / "data" / "cifar10"
NAMES = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]


def made_up(count: int, num_classes: int = 10, seed: int = 0) -> LabelledImages:
    """Smooth images whose colour tells the class, so that there is something to learn and JPEG keeps it."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_classes, size=count)
    colours = np.stack([labels * 20 % 256, labels * 50 % 256, 255 - labels * 20 % 256], 1)
    noise = generator.integers(-10, 10, size=(count, 3, 1, 1))
    pixels = np.clip(colours[:, :, None, None] + noise + np.zeros((1, 1, 32, 32)), 0, 255)
    return LabelledImages(pixels.astype(np.uint8), labels.astype(np.uint8))


def archive_files(num_classes: int) -> tuple[dict[str, bytes], LabelledImages, LabelledImages]:
    """The members of an official archive, and what is in them."""
    is_small = num_classes == 10
    train, test = made_up(50, num_classes), made_up(20, num_classes, seed=1)
    label_key = b"labels" if is_small else b"fine_labels"

    def batch(part: LabelledImages) -> bytes:
        values = {b"data": part.pixels.reshape(len(part.labels), -1), label_key: part.labels.tolist()}
        return pickle.dumps(values, protocol=2)

    if is_small:
        files = {
            f"data_batch_{index + 1}": batch(
                LabelledImages(train.pixels[index * 10 : index * 10 + 10], train.labels[index * 10 : index * 10 + 10])
            )
            for index in range(5)
        }
        files |= {"test_batch": batch(test), "batches.meta": pickle.dumps({b"label_names": NAMES}, protocol=2)}
        return files, train, test
    names = [f"class {index}".encode() for index in range(100)]
    files = {"train": batch(train), "test": batch(test), "meta": pickle.dumps({b"fine_label_names": names}, protocol=2)}
    return files, train, test


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_jpegs(folder: Path, train: LabelledImages, test: LabelledImages) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        encoded: list[bytes] = []
        for pixels in part.pixels:
            stream = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "jpeg", quality=95)
            encoded.append(stream.getvalue())
        arrays: dict[str, Any] = {
            "jpeg": np.frombuffer(b"".join(encoded), np.uint8),
            "offsets": np.cumsum([0, *map(len, encoded)]),
            "labels": part.labels,
        }
        np.savez(folder / f"{name}.npz", **arrays)
