"""Nets as users write them, and small colour images for nets that take no others."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from project.data import Digits


class ColourDigits(Digits):
    """200 digits for training and 40 for testing, as colour images of 32x32 pixels."""

    image_shape = (3, 32, 32)
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load(train)
        count = 200 if train else 40
        large = F.interpolate(images[:count].float(), (32, 32), mode="bilinear")
        return large.to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), labels[:count]


class NumOutputs(nn.Module):
    """Calls the number of classes otherwise, and has no default for it."""

    def __init__(self, num_outputs: int, in_planes: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_planes, 8, 3, stride=2)
        self.fc = nn.Linear(8, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


class Untyped(nn.Module):
    """No argument has a type."""

    def __init__(self, width, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


class Keywords(Untyped):
    """Takes all its arguments as ``**kwargs``, and reads them where no tool sees it."""

    def __init__(self, **kwargs):
        options = {"width": 8, **kwargs}
        super().__init__(options["width"], options["num_classes"])


class Fixed(nn.Module):
    """Ten classes, colour images, no argument."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean(dim=(2, 3)))


class Lazy(nn.Module):
    """Layers that find out the number of their inputs from the first images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(8, 3, stride=2)
        self.norm = nn.LazyBatchNorm2d()
        self.fc = nn.LazyLinear(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().flatten(1))


class Pair(Untyped):
    """Two outputs."""

    def forward(self, images):
        logits = super().forward(images)
        return logits, logits


def build(width: int = 8, num_classes: int = 10) -> nn.Module:
    """A function that makes a net."""
    return Untyped(width, num_classes)


class ClassDefault(Untyped):
    """The default of an argument without a type is a class."""

    def __init__(self, width, act=nn.ReLU, num_classes=10):
        super().__init__(width, num_classes)
        self.act = act()

    def forward(self, images):
        return self.fc(self.act(self.conv(images)).mean(dim=(2, 3)))


def nohint(width=8, num_classes=10):
    """A function that does not say what it makes."""
    return Untyped(width, num_classes)


def build_digits(num_classes: int = 10) -> nn.Module:
    """A function that makes a net for digits."""
    return NumOutputs(num_classes)
