"""Nets that only studies need.

They are kept here because a user is better served by the nets of :mod:`project.models`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from project.models import BatchNorm, Inception, MaxPool, NaiveInception, NoNorm, ReLU
from project.models.layers import ConvNormAct, GlobalAvgPool, NormFactory, WeightInit, conv_factory, init_weights_


class PlainStack(nn.Module):
    """3x3 convolutions without shortcuts, in the manner of VGG (Simonyan & Zisserman 2015): ``[N, C, H, W] -> [N, K]``.

    A max pooling after the first convolution and one after half of them halve the image. Global average pooling and
    one linear layer come last.

    Args:
        num_classes: number K of classes, at least 1.
        image_shape: shape (C, H, W) of the images.
        depth: number of convolutions, at least 2.
        width: number of channels of each convolution, at least 1.
        norm: factory of the norm after each convolution, which takes the number of channels.
        activation: factory of the activation, called without arguments.
        fc_dropout: dropout rate before the linear layer, in [0, 1).
        weight_init: function that fills the weight of a layer in place.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        depth: int = 8,
        width: int = 32,
        norm: NormFactory = BatchNorm,
        activation: Callable[[], nn.Module] = ReLU,
        fc_dropout: float = 0.0,
        weight_init: WeightInit = nn.init.kaiming_normal_,
    ) -> None:
        super().__init__()
        conv = conv_factory(norm, activation)
        self.layers = nn.Sequential()
        channels = image_shape[0]
        for number in range(depth):
            self.layers.append(conv(channels, width, 3))
            channels = width
            if number in (0, depth // 2):
                self.layers.append(MaxPool(2, ceil_mode=True))
        self.pool = GlobalAvgPool()
        self.dropout = nn.Dropout(fc_dropout)
        self.fc = nn.Linear(channels, num_classes)
        init_weights_(self, weight_init)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.pool(self.layers(images))))


class ConvThenLinear(nn.Module):
    """Two convolutions, one hidden linear layer, one linear layer: ``[N, C, H, W] -> [N, num_classes]``.

    Convolutions and linear layers have dropout rates of their own, so that they can be regularised apart.

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images.
        conv_dropout: dropout rate after each convolution, in [0, 1).
        fc_dropout: dropout rate before each linear layer, in [0, 1).
        norm: factory of the norm after each convolution and after the hidden layer, which takes the number of channels.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        conv_dropout: float = 0.0,
        fc_dropout: float = 0.0,
        norm: NormFactory = NoNorm,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.features = nn.Sequential()
        for out_channels in (16, 32):
            self.features.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            pool = nn.MaxPool2d(2, ceil_mode=True)
            self.features.append(nn.Sequential(norm(out_channels), nn.ReLU(), pool, nn.Dropout(conv_dropout)))
            channels, height, width = out_channels, -(-height // 2), -(-width // 2)
        self.hidden = nn.Linear(channels * height * width, 128)
        self.norm = norm(128)
        self.act = nn.ReLU()
        self.dropouts = nn.ModuleList([nn.Dropout(fc_dropout), nn.Dropout(fc_dropout)])
        self.fc = nn.Linear(128, num_classes)
        init_weights_(self, nn.init.kaiming_normal_)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.hidden(self.dropouts[0](self.features(images).flatten(1)))
        normed = self.norm(hidden[..., None, None]).flatten(1)
        return self.fc(self.dropouts[1](self.act(normed)))


class Perceptron(nn.Module):
    """Two hidden linear layers with ReLU, one linear layer: ``[N, C, H, W] -> [N, num_classes]``.

    With 300 and 100 hidden units it is LeNet-300-100 (LeCun et al. 1998).

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images.
        hidden: number of units of the two hidden layers, each at least 1.
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], *, hidden: tuple[int, int] = (300, 100)
    ) -> None:
        super().__init__()
        first, second = hidden
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), first), nn.ReLU())
        self.layers.extend([nn.Linear(first, second), nn.ReLU(), nn.Linear(second, num_classes)])
        init_weights_(self, nn.init.kaiming_normal_)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class BlockNet(nn.Module):
    """A stem, two stages of Inception blocks, global average pooling, one linear layer: ``[N, C, H, W] -> [N, K]``.

    Args:
        num_classes: number K of classes, at least 1.
        image_shape: shape (C, H, W) of the images.
        bottleneck: whether the blocks have 1x1 convolutions before the 3x3 and 5x5 and after the pooling (figure 2b of
            Szegedy et al. 2014, arXiv:1409.4842), or none (figure 2a).
        width: factor on the widths of all convolutions, above 0.
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], *, bottleneck: bool = True, width: float = 1.0
    ) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * width))

        channels = scaled(32)
        self.stem = nn.Sequential(ConvNormAct(image_shape[0], channels, 3), MaxPool(2, ceil_mode=True))
        self.blocks = nn.Sequential()
        for outputs in (64, 128):
            quarter, half, eighth = scaled(outputs // 4), scaled(outputs // 2), scaled(outputs // 8)
            if bottleneck:
                block: nn.Module = Inception(channels, quarter, quarter, half, eighth, eighth, eighth)
            else:
                block = NaiveInception(channels, quarter, half, eighth)
            self.blocks.append(block)
            self.blocks.append(MaxPool(2, ceil_mode=True))
            channels = block.out_channels  # type: ignore[assignment]
        self.pool = GlobalAvgPool()
        self.fc = nn.Linear(channels, num_classes)
        init_weights_(self, nn.init.kaiming_normal_)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(images))))


def large_normal_(weight: Tensor) -> Tensor:
    """Fill a weight with twice the standard deviation of He et al. 2015 (arXiv:1502.01852), in place."""
    nn.init.kaiming_normal_(weight)
    with torch.no_grad():
        return weight.mul_(2)
