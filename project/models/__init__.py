"""Networks and their layers. A net is a plain ``nn.Module``: images ``[N, C, H, W]`` -> logits ``[N, num_classes]``."""

from typing import Any

from project.frame.rooms import optional
from project.models import layers
from project.models.googlenet import BNGoogLeNet, GoogLeNet
from project.models.inception_blocks import Inception, NaiveInception
from project.models.inception_v3 import InceptionV3
from project.models.inception_v3_blocks import (
    AsymmetricInception,
    ExpandedInception,
    FactorizedInception,
    GridReduction,
)
from project.models.layers import (
    BatchNorm,
    DropPath,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MaxPool,
    NoNorm,
    ReLU,
)
from project.models.lenet import LeNet5, LeNet300100
from project.models.small_inception import SmallInception

# Imported here, before anybody can replace the `forward` of a class: the kernels remember the original one.
layers.kernels = optional("models.kernels")

__all__ = [
    "AsymmetricInception",
    "BNGoogLeNet",
    "BatchNorm",
    "DropPath",
    "ExpandedInception",
    "FactorizedInception",
    "GoogLeNet",
    "GridReduction",
    "GroupNorm",
    "Inception",
    "InceptionV3",
    "InstanceNorm",
    "LayerNorm",
    "LeNet5",
    "LeNet300100",
    "MaxPool",
    "NaiveInception",
    "NoNorm",
    "ReLU",
    "SmallInception",
]


def __getattr__(name: str) -> Any:
    if name == "Classifier":  # it was defined here once; old checkpoints and configurations name this place
        from project.learning.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
