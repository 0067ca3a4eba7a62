"""Inception blocks: parallel convolutions of several sizes, side by side in the output's channels.

Going deeper with convolutions, Szegedy et al. 2014 (arXiv:1409.4842): figure 2a (naive) and 2b (1x1 bottlenecks). The
factorised blocks of the third version are in :mod:`project.models.inception_v3_blocks`.

Every block takes ``[N, in_channels, H, W]`` and has ``out_channels``. Its convolutions come from a ``conv`` factory
(:func:`project.models.layers.conv_factory`: norm and activation are chosen there); ``dropout`` makes the module that
acts on each branch's output, so that :class:`~project.models.layers.DropPath` drops whole branches and channel dropout
whole feature maps.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from project.models.layers import ConvFactory, ConvNormAct, MaxPool

DropoutMaker = Callable[[], nn.Module]


class Branches(nn.Module):
    """Runs its branches on one input and concatenates them along the channels, in the order given.

    Args:
        dropout: makes the module on each branch's output.
        branches: modules that give maps of one size.
    """

    out_channels: int

    def __init__(self, dropout: DropoutMaker, **branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.dropouts = nn.ModuleDict({name: dropout() for name in branches})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.dropouts[name](branch(x)) for name, branch in self.branches.items()], dim=1)


class NaiveInception(Branches):
    """Figure 2a: 1x1, 3x3, 5x5 and 3x3 max pooling straight from the input.

    The pooling branch keeps all ``in_channels``, so widths only grow: what figure 2b repairs.
    """

    def __init__(
        self,
        in_channels: int,
        conv1x1: int,
        conv3x3: int,
        conv5x5: int,
        *,
        conv: ConvFactory = ConvNormAct,
        dropout: DropoutMaker = nn.Identity,
    ) -> None:
        super().__init__(
            dropout,
            conv1x1=conv(in_channels, conv1x1, 1),
            conv3x3=conv(in_channels, conv3x3, 3),
            conv5x5=conv(in_channels, conv5x5, 5),
            pool=MaxPool(3, stride=1, padding=1),
        )
        self.out_channels = conv1x1 + conv3x3 + conv5x5 + in_channels


class Inception(Branches):
    """Figure 2b: 1x1 convolutions shrink the channels before the 3x3 and 5x5, and after the pooling.

    Args:
        in_channels: channels of the input.
        conv1x1, reduce3x3, conv3x3, reduce5x5, conv5x5, pool_proj: widths, in the order of the columns of table 1.
        factorized: the 5x5 as two 3x3 (Szegedy et al. 2015, figure 5): 18/25 of its cost.
        pool: factory of the pooling that keeps the size.
        conv, dropout: see the module.
    """

    def __init__(
        self,
        in_channels: int,
        conv1x1: int,
        reduce3x3: int,
        conv3x3: int,
        reduce5x5: int,
        conv5x5: int,
        pool_proj: int,
        *,
        factorized: bool = False,
        pool: Callable[[], nn.Module] = lambda: MaxPool(3, stride=1, padding=1),
        conv: ConvFactory = ConvNormAct,
        dropout: DropoutMaker = nn.Identity,
    ) -> None:
        if factorized:
            large = [conv(reduce5x5, conv5x5, 3), conv(conv5x5, conv5x5, 3)]
        else:
            large = [conv(reduce5x5, conv5x5, 5)]
        super().__init__(
            dropout,
            conv1x1=conv(in_channels, conv1x1, 1),
            conv3x3=nn.Sequential(conv(in_channels, reduce3x3, 1), conv(reduce3x3, conv3x3, 3)),
            conv5x5=nn.Sequential(conv(in_channels, reduce5x5, 1), *large),
            pool=nn.Sequential(pool(), conv(in_channels, pool_proj, 1)),
        )
        self.out_channels = conv1x1 + conv3x3 + conv5x5 + pool_proj
