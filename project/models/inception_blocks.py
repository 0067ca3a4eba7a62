"""Inception blocks: parallel convolutions of several sizes, whose outputs are concatenated along the channels.

Going deeper with convolutions, Szegedy et al. 2014 (arXiv:1409.4842): figure 2a (naive) and 2b (1x1 bottlenecks). The
factorised blocks of the third version are in :mod:`project.models.zoo.inception_v3_blocks`.

Every block takes ``[N, in_channels, H, W]`` and has the attribute ``out_channels``. A factory ``conv`` makes its
convolutions together with their norm and activation (:func:`project.models.layers.conv_factory`). A factory ``dropout``
makes the module that acts on each branch's output. So :class:`~project.models.layers.DropPath` drops whole branches,
and channel dropout drops whole feature maps.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from project.models.layers import ConvFactory, ConvNormAct, MaxPool

DropoutMaker = Callable[[], nn.Module]


class Branches(nn.Module):
    """Base class of the blocks: runs its branches on one input and concatenates their outputs along the channels.

    Args:
        dropout: factory of the module that acts on each branch's output, called without arguments.
        branches: branches by name, in the order of their outputs. Their outputs have the same height and width.
    """

    out_channels: int

    def __init__(self, dropout: DropoutMaker, **branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.dropouts = nn.ModuleDict({name: dropout() for name in branches})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.dropouts[name](branch(x)) for name, branch in self.branches.items()], dim=1)


class NaiveInception(Branches):
    """The naive block (figure 2a): 1x1, 3x3 and 5x5 convolution and 3x3 max pooling, all directly on the input.

    The pooling branch keeps all ``in_channels``, so the width grows from block to block. Figure 2b repairs this.

    Example::

        >>> import torch
        >>> from project.models import NaiveInception
        >>> block = NaiveInception(in_channels=32, conv1x1=16, conv3x3=24, conv5x5=8)
        >>> block(torch.rand(2, 32, 14, 14)).shape
        torch.Size([2, 80, 14, 14])

    Args:
        in_channels: number of channels of the input, at least 1.
        conv1x1, conv3x3, conv5x5: width (number of output channels) of the convolution of this size, at least 1.
        conv: factory of a convolution with its norm and activation.
        dropout: factory of the module that acts on each branch's output, called without arguments.
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
    """The Inception block (figure 2b): 1x1 convolutions reduce the channels before the 3x3 and 5x5, and after pooling.

    Example::

        >>> import torch
        >>> from project.models import Inception
        >>> block = Inception(192, 64, 96, 128, 16, 32, 32, factorized=True)  # block 3a of GoogLeNet
        >>> block(torch.rand(2, 192, 14, 14)).shape
        torch.Size([2, 256, 14, 14])

    Args:
        in_channels: number of channels of the input, at least 1.
        conv1x1: width (number of output channels) of the 1x1 branch, at least 1.
        reduce3x3, conv3x3: widths of the 1x1 and of the 3x3 in the 3x3 branch, at least 1 each.
        reduce5x5, conv5x5: widths of the 1x1 and of the 5x5 in the 5x5 branch, at least 1 each.
        pool_proj: width of the 1x1 after the pooling, at least 1.
        factorized: whether two 3x3 replace the 5x5 (Szegedy et al. 2015, figure 5), at 18/25 of its cost.
        pool: factory of the pooling, which keeps height and width; called without arguments.
        conv: factory of a convolution with its norm and activation.
        dropout: factory of the module that acts on each branch's output, called without arguments.
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
