"""Networks and their layers. A net is a plain ``nn.Module``: images ``[N, C, H, W]`` -> logits ``[N, num_classes]``."""

from project.frame.rooms import lazily, optional
from project.models import layers
from project.models.inception_blocks import Inception, NaiveInception
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
from project.models.small_inception import SmallInception

# Imported here, before anybody can replace the `forward` of a class: the kernels remember the original one.
layers.kernels = optional("models.kernels")

_HOMES = {
    "AsymmetricInception": "project.models.zoo.inception_v3_blocks",
    "BNGoogLeNet": "project.models.zoo.googlenet",
    "Classifier": "project.learning.classifier",  # its former place, which old checkpoints and configurations name
    "ExpandedInception": "project.models.zoo.inception_v3_blocks",
    "FactorizedInception": "project.models.zoo.inception_v3_blocks",
    "GoogLeNet": "project.models.zoo.googlenet",
    "GridReduction": "project.models.zoo.inception_v3_blocks",
    "InceptionV3": "project.models.zoo.inception_v3",
    "LeNet5": "project.models.zoo.lenet",
    "LeNet300100": "project.models.zoo.lenet",
}
"""The modules of the classic nets. Each is imported when its name is first used."""

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
__getattr__ = lazily(_HOMES)
