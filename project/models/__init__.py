"""Networks: plain ``nn.Module``, images ``[N, C, H, W]`` -> logits ``[N, num_classes]``, and what they are made of."""

from project.models.classifier import Classifier
from project.models.googlenet import BNGoogLeNet, GoogLeNet
from project.models.inception_blocks import Inception, NaiveInception
from project.models.inception_v3 import InceptionV3
from project.models.inception_v3_blocks import (
    AsymmetricInception,
    ExpandedInception,
    FactorizedInception,
    GridReduction,
)
from project.models.layers import BatchNorm, DropPath, GroupNorm, InstanceNorm, LayerNorm, MaxPool, NoNorm, ReLU
from project.models.lenet import LeNet5, LeNet300100
from project.models.small_inception import SmallInception

__all__ = [
    "AsymmetricInception",
    "BNGoogLeNet",
    "BatchNorm",
    "Classifier",
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
