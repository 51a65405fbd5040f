"""CIFAR-10 and CIFAR-100 from disk: the official Python archives, or JPEG images in `.npz` files."""

import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mars_lab.errors import InputError

SIZE = 32

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Archive:
    """What an official archive is called and holds."""

    tar: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: bytes
    meta: str
    names: bytes
    num_classes: int


_ARCHIVES = {
    "cifar10": _Archive(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{index}" for index in range(1, 6)),
        ("test_batch",),
        b"labels",
        "batches.meta",
        b"label_names",
        10,
    ),
    "cifar100": _Archive(
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        ("train",),
        ("test",),
        b"fine_labels",
        "meta",
        b"fine_label_names",
        100,
    ),
}


@dataclass(frozen=True)
class LabelledImages:
    """`pixels`: uint8 (count, 3, 32, 32), red, green, blue. `labels`: uint8 (count,)."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ImageData:
    """A data set, its official split, and the names of its classes."""

    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]


@lru_cache(maxsize=1)  # several runs in one process share the images
def load(dataset: Literal["cifar10", "cifar100"], source: Path) -> ImageData:
    """Read `dataset` from `source`: an official archive (.tar.gz, or unpacked), a folder that holds one, or a folder
    with `train.npz` and `test.npz`, in which `jpeg` are files one after the other, `offsets` (count + 1) says where
    each begins and `labels` what it shows.

    Raises:
        InputError: none of these is there, or what is there is damaged or of another data set.
    """
    archive = _ARCHIVES[dataset]
    try:
        found = _read(archive, source)
    except (ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError, tarfile.TarError) as error:
        raise InputError(f"{source} can't be read as {dataset} ({error}); restore it") from None
    if found is None:
        raise InputError(
            f"no {dataset} at {str(source)!r}: put {archive.tar} there (from the data set's home page), its folder "
            f"{archive.folder}, or train.npz and test.npz of JPEG images; --data.path says where it is"
        )
    for part, images in (("train", found.train), ("test", found.test)):
        if len(images.pixels) != len(images.labels) or not len(images.labels):
            raise InputError(
                f"the {part} part at {source} has {len(images.pixels)} images and {len(images.labels)} labels; "
                "restore it"
            )
        if images.labels.max() >= archive.num_classes:
            raise InputError(
                f"{source} has a label {images.labels.max()}, but {dataset} has {archive.num_classes} classes; "
                "--data.dataset says which it is"
            )
    return found


def _read(archive: _Archive, source: Path) -> ImageData | None:
    if (source / "train.npz").is_file() and (source / "test.npz").is_file():
        names = _CIFAR10 if archive.num_classes == len(_CIFAR10) else ()
        return ImageData(_jpegs(source / "train.npz"), _jpegs(source / "test.npz"), names)
    for folder in (source, source / archive.folder):
        if (folder / archive.test[0]).is_file():
            return _batches(archive, {name: (folder / name).read_bytes() for name in _members(archive)})
    for tar in (source, source / archive.tar):
        if tar.is_file():
            with tarfile.open(tar) as opened:
                return _batches(archive, {name: _member(opened, archive, name) for name in _members(archive)})
    return None


def _members(archive: _Archive) -> tuple[str, ...]:
    return (*archive.train, *archive.test, archive.meta)


def _member(opened: tarfile.TarFile, archive: _Archive, name: str) -> bytes:
    stream = opened.extractfile(f"{archive.folder}/{name}")
    if stream is None:
        raise ValueError(f"{name} in it is no file")
    return stream.read()


def _batches(archive: _Archive, files: Mapping[str, bytes]) -> ImageData:
    train, test = ([_unpickle(files[name]) for name in names] for names in (archive.train, archive.test))
    names = tuple(name.decode() for name in _unpickle(files[archive.meta])[archive.names])
    return ImageData(_joined(train, archive.labels), _joined(test, archive.labels), names)


def _joined(batches: list[dict[bytes, Any]], labels: bytes) -> LabelledImages:
    pixels = np.concatenate([batch[b"data"] for batch in batches])
    return LabelledImages(
        pixels.reshape(-1, 3, SIZE, SIZE), np.concatenate([np.array(batch[labels], np.uint8) for batch in batches])
    )


class _Unpickler(pickle.Unpickler):
    """Arrays and plain values only: a pickle from elsewhere could otherwise run any code."""

    _ALLOWED = frozenset(
        {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        module = module_name.rpartition(".")[2] if module_name.startswith("numpy.") else module_name
        if (module, global_name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no CIFAR archive does")
        if module == "multiarray":
            module_name = "numpy._core.multiarray"
        return super().find_class(module_name, global_name)


def _unpickle(data: bytes) -> dict[bytes, Any]:
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()


def _jpegs(path: Path) -> LabelledImages:
    with np.load(path) as file:
        jpeg, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"]
    pixels = np.empty((len(offsets) - 1, SIZE, SIZE, 3), np.uint8)
    for index, (begin, end) in enumerate(pairwise(offsets)):
        with Image.open(io.BytesIO(jpeg[begin:end])) as image:
            pixels[index] = np.asarray(image.convert("RGB"))
    return LabelledImages(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels.astype(np.uint8))
