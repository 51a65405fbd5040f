"""The image classifiers of the papers' vision experiments: ResNet-18 and a small CNN, for images of 32 x 32.

A suffix on a name gives its shape:
    B batch    C channels    H height    W width    K classes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mars_lab.errors import InputError


@dataclass(frozen=True)
class ImageModelConfig:
    """Which classifier, and how large."""

    name: Literal["resnet18", "cnn"] = "resnet18"
    """`cnn`: six convolutions in three stages, one hidden layer of 16 * width units."""
    width: int = 64
    """Channels of the first stage; each of the others has twice as many as the one before."""
    dropout: float = 0.0
    """Of `cnn`, after each stage and after the hidden layer."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"model.width must be at least 1, got {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout must be in [0, 1), got {self.dropout}")
        if self.dropout and self.name != "cnn":
            raise InputError(f"model.dropout is for model.name=cnn; {self.name} has none")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input is added; 1 x 1 where its shape changes."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.bn2(self.conv2(y_BCHW)) + self.shortcut(x_BCHW))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016) with a first convolution of 3 x 3 and no pooling after it, as is usual at 32 x 32.

    torchvision's, made for 224 x 224, would look at CIFAR through a stride of 4.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width * 2**stage for stage in range(4)]
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(num_in, num_out, stride), ResidualBlock(num_out, num_out, 1))
            for num_in, num_out, stride in zip([width, *widths], widths, (1, 2, 2, 2), strict=False)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        return self.head(x_BCHW.mean((2, 3)))


class SmallCNN(nn.Module):
    """Three stages of two 3 x 3 convolutions (each followed by ReLU, then batch norm) and pooling; a hidden layer."""

    def __init__(self, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(3)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *_convolution(num_in, num_out), *_convolution(num_out, num_out), nn.MaxPool2d(2), nn.Dropout(dropout)
            )
            for num_in, num_out in zip([3, *widths], widths, strict=False)
        )
        self.hidden = nn.Linear(widths[-1] * 4 * 4, 16 * width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16 * width, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # A third faster on a CPU. ResNet gains an eighth, but its 1 x 1 convolutions then have gradients whose strides
        # DDP has to undo.
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        return self.head(self.dropout(F.relu(self.hidden(x_BCHW.flatten(1)))))


def _convolution(num_in: int, num_out: int) -> Sequence[nn.Module]:
    return nn.Conv2d(num_in, num_out, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(num_out)


def build(config: ImageModelConfig, num_classes: int) -> nn.Module:
    """A classifier from normalised images (B, 3, 32, 32) to logits (B, K); weights start as PyTorch's layers do."""
    if config.name == "cnn":
        return SmallCNN(config.width, num_classes, config.dropout)
    return ResNet18(config.width, num_classes)
