"""Image classification: ResNet-18 or a small CNN on CIFAR."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from mars_lab.data import cifar
from mars_lab.data.augmentation import AugmentedImages, packed, unpacked
from mars_lab.data.cifar import LabelledImages
from mars_lab.errors import InputError
from mars_lab.models import images
from mars_lab.models.images import ImageModelConfig
from mars_lab.ranks import Ranks

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the pixels of CIFAR-10's training images by channel, in units of 255."""


@dataclass(frozen=True)
class ImageDataConfig:
    """Which images."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    path: str = "data/cifar10"
    """An official archive, packed or not, or the folder that holds it or train.npz and test.npz of JPEG images."""
    augment: bool = True
    """Shift training images by up to 4 pixels and mirror half of them."""


@dataclass(frozen=True)
class VisionConfig:
    """A classifier, its images, and how it is judged."""

    model: ImageModelConfig = field(default_factory=ImageModelConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    eval_images: int = 0
    """Test images, spread evenly over the test set and the same each time; 0 means all of it."""
    eval_train_images: int = 2000
    """Training images, without augmentation, whose loss and accuracy are measured too; 0 measures none."""
    eval_batch_size: int = 500
    """Images evaluated at once; it changes memory and time, not the result."""


class VisionTask:
    """Classification; a sequence is one image, packed with its label."""

    def __init__(self, config: VisionConfig, seed: int) -> None:
        self.config = config
        self.data = cifar.load(config.data.dataset, Path(config.data.path))
        self.num_classes = max(int(self.data.train.labels.max()) + 1, len(self.data.class_names))
        self._train = AugmentedImages(self.data.train, seed, is_augmented=config.data.augment)
        self._held_out = packed(_spread(self.data.test, config.eval_images))
        self._seen = packed(_spread(self.data.train, config.eval_train_images)) if config.eval_train_images else None

    @property
    def fingerprint(self) -> str:
        """A line a part."""
        parts = {"train": self.data.train, "test": self.data.test}
        return "\n".join(f"{part} {len(p.labels)} {_sha256(p)}" for part, p in parts.items())

    @property
    def unit(self) -> str:
        """What has a label of its own."""
        return "image"

    @property
    def tokens_per_sequence(self) -> int:
        """One: an image has one label."""
        return 1

    def build_model(self) -> nn.Module:
        """The classifier with fresh weights."""
        return images.build(self.config.model, self.num_classes)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """Raises: batch norm's statistics would differ between processes, and these models fit everywhere."""
        raise InputError("image classifiers are not sharded; use --parallel ddp")

    def split_layers(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Raises, as `layers` does."""
        self.layers(model)

    def batch(self, first: int, count: int) -> Tensor:
        """Augmented images with their labels: uint8 (count, 3 * 32 * 32 + 1)."""
        return self._train.sequences(first, count)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross-entropy per image, in nats."""
        logits, labels = _answers(model, batch)
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Mean cross-entropy in nats, and accuracy: `val_loss` and `val_accuracy` (test), and the same of `train`."""
        model.eval()
        ranks.copy_first_(list(model.buffers()))  # each process has batch statistics of its own share
        measures = self._measured(model, self._held_out, ranks, "val")
        if self._seen is not None:
            measures |= self._measured(model, self._seen, ranks, "train")
        model.train()
        return measures

    def _measured(self, model: nn.Module, rows: Tensor, ranks: Ranks, name: str) -> dict[str, float]:
        loss, num_right = 0.0, 0.0
        for batch in rows.split(self.config.eval_batch_size):
            own, weight = ranks.weighted_rows(batch)
            logits, labels = _answers(model, own.to(ranks.device))
            loss += F.cross_entropy(logits, labels).item() * weight
            num_right += (logits.argmax(-1) == labels).float().mean().item() * weight
        # Processes with the same share count its rows equally often, above and below.
        count = len(rows) * ranks.size / ranks.num_shares
        loss, num_right = ranks.sums([loss, num_right])
        return {f"{name}_loss": loss / count, f"{name}_accuracy": num_right / count}

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return self.data.class_names or tuple(f"class {index}" for index in range(self.num_classes))

    @torch.no_grad()
    def judged(self, model: nn.Module, device: str) -> tuple[float, Tensor]:
        """Mean cross-entropy on the test images, and how many of each class (rows) were taken for each (columns)."""
        model.eval()
        loss, counts = 0.0, torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        for batch in self._held_out.split(self.config.eval_batch_size):
            logits, labels = _answers(model, batch.to(device))
            loss += F.cross_entropy(logits, labels).item() * len(batch)
            counts.index_put_((labels.cpu(), logits.argmax(-1).cpu()), torch.ones(len(batch)).long(), accumulate=True)
        model.train()
        return loss / len(self._held_out), counts

    def sample(self, model: nn.Module, device: str) -> str:
        """The accuracy of each class, and what it is most often taken for."""
        lines = [f"{'class':16} accuracy  most often taken for"]
        for name, accuracy, mistaken in by_class(self.class_names, self.judged(model, device)[1].tolist()):
            lines.append(f"{name:16} {accuracy:8.3f}  {mistaken}")
        return "\n".join(lines)


def by_class(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Iterator[tuple[str, float, str]]:
    """Of each class its name, its accuracy, and what it is most often taken for, with how often."""
    for index, row in enumerate(counts):
        wrong = [0 if other == index else count for other, count in enumerate(row)]
        mistaken = f"{names[wrong.index(max(wrong))]} ({max(wrong)})" if max(wrong) else "nothing else"
        yield names[index], row[index] / max(1, sum(row)), mistaken


def _answers(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float32, and labels."""
    pixels_BCHW, labels_B = unpacked(rows)
    mean, deviation = (torch.tensor(v, device=rows.device).view(3, 1, 1) * 255 for v in (MEAN, DEVIATION))
    x_BCHW = (pixels_BCHW.float() - mean) / deviation
    dtype = next(model.parameters()).dtype
    logits_BK = model(x_BCHW if torch.is_autocast_enabled(rows.device.type) else x_BCHW.to(dtype))
    return logits_BK.float(), labels_B


def _spread(part: LabelledImages, count: int) -> LabelledImages:
    """`count` images at equal distances; 0 means all."""
    available = len(part.labels)
    count = min(count, available) if count else available
    chosen = np.arange(count) * available // count
    return LabelledImages(part.pixels[chosen], part.labels[chosen])


def _sha256(part: LabelledImages) -> str:
    digest = hashlib.sha256(part.pixels.tobytes())
    digest.update(part.labels.tobytes())
    return digest.hexdigest()
