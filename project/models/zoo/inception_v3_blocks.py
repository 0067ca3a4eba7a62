"""The blocks of Inception v3: stacks of small or one-dimensional convolutions replace large ones.

Rethinking the Inception architecture for computer vision, Szegedy et al. 2015 (arXiv:1512.00567): figure 5 (5x5 as two
3x3, section 3.1), figure 6 (nxn as 1xn and nx1, section 3.2), figure 7 (expanded filter bank, section 6), figure 10
(grid reduction, section 5). The pooling that keeps the size is an average, as in the paper's code and torchvision; the
figures say "Pool" only.

The factories ``conv`` and ``dropout`` are those of :mod:`project.models.inception_blocks`. Each width (number of output
channels) is named after its branch. The order of the branches in the output is 1x1, middle, long, pooling.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from project.models.inception_blocks import Branches, DropoutMaker
from project.models.layers import ConvFactory, ConvNormAct, MaxPool

_average_pool = partial(nn.AvgPool2d, 3, stride=1, padding=1)


class FactorizedInception(Branches):
    """Figure 5: two 3x3 replace the 5x5 of figure 4 (figure 2b of the first paper), at 18/25 of its cost.

    The cost is that of equal widths.

    Example::

        >>> import torch
        >>> from project.models import FactorizedInception
        >>> block = FactorizedInception(192, 64, 48, 64, 64, 96, 32, kernel_size=5)  # block 5b of Inception v3
        >>> block(torch.rand(2, 192, 8, 8)).shape
        torch.Size([2, 256, 8, 8])

    Args:
        in_channels: number of channels of the input, at least 1.
        conv1x1: width of the 1x1 branch, at least 1.
        reduce_middle, middle: widths of the 1x1 and of the kernel_size x kernel_size in the middle branch, at least 1.
        reduce_long, long: widths of the 1x1 and of each of the two 3x3 in the long branch, at least 1.
        pool_proj: width of the 1x1 after the pooling, at least 1.
        kernel_size: side of the middle branch's kernel, an odd number. It is 3 in the figure and 5 in the paper's
            published net (and torchvision's).
        conv: factory of a convolution with its norm and activation.
        dropout: factory of the module that acts on each branch's output, called without arguments.
    """

    def __init__(
        self,
        in_channels: int,
        conv1x1: int,
        reduce_middle: int,
        middle: int,
        reduce_long: int,
        long: int,
        pool_proj: int,
        *,
        kernel_size: int = 3,
        conv: ConvFactory = ConvNormAct,
        dropout: DropoutMaker = nn.Identity,
    ) -> None:
        super().__init__(
            dropout,
            conv1x1=conv(in_channels, conv1x1, 1),
            middle=nn.Sequential(conv(in_channels, reduce_middle, 1), conv(reduce_middle, middle, kernel_size)),
            long=nn.Sequential(conv(in_channels, reduce_long, 1), conv(reduce_long, long, 3), conv(long, long, 3)),
            pool=nn.Sequential(_average_pool(), conv(in_channels, pool_proj, 1)),
        )
        self.out_channels = conv1x1 + middle + long + pool_proj


class AsymmetricInception(Branches):
    """Figure 6: a 1xn and an nx1 convolution replace an nxn, at 2/n of its cost.

    The middle branch sees nxn pixels, the long branch (2n-1)x(2n-1).

    Example::

        >>> import torch
        >>> from project.models import AsymmetricInception
        >>> block = AsymmetricInception(768, 192, 128, 192, 192, 192, kernel_size=7)  # block 6b of Inception v3
        >>> block(torch.rand(2, 768, 8, 8)).shape
        torch.Size([2, 768, 8, 8])

    Args:
        in_channels: number of channels of the input, at least 1.
        conv1x1: width of the 1x1 branch, at least 1.
        reduce: width of the convolutions inside the middle and the long branch, at least 1.
        middle, long: width of the last convolution of this branch, at least 1.
        pool_proj: width of the 1x1 after the pooling, at least 1.
        kernel_size: the number n, which is odd; the paper takes 7 on maps of 17x17.
        conv: factory of a convolution with its norm and activation.
        dropout: factory of the module that acts on each branch's output, called without arguments.
    """

    def __init__(
        self,
        in_channels: int,
        conv1x1: int,
        reduce: int,
        middle: int,
        long: int,
        pool_proj: int,
        *,
        kernel_size: int = 7,
        conv: ConvFactory = ConvNormAct,
        dropout: DropoutMaker = nn.Identity,
    ) -> None:
        row, column = (1, kernel_size), (kernel_size, 1)
        super().__init__(
            dropout,
            conv1x1=conv(in_channels, conv1x1, 1),
            middle=_chain(conv, [in_channels, reduce, reduce, middle], [1, row, column]),
            long=_chain(conv, [in_channels, reduce, reduce, reduce, reduce, long], [1, column, row, column, row]),
            pool=nn.Sequential(_average_pool(), conv(in_channels, pool_proj, 1)),
        )
        self.out_channels = conv1x1 + middle + long + pool_proj


class ExpandedInception(Branches):
    """Figure 7: two branches end in a 1x3 and a 3x1 side by side, for wide representations on the coarsest (8x8) maps.

    Example::

        >>> import torch
        >>> from project.models import ExpandedInception
        >>> block = ExpandedInception(1280, 320, 384, 384, 448, 384, 192)  # block 7b of Inception v3
        >>> block(torch.rand(2, 1280, 4, 4)).shape
        torch.Size([2, 2048, 4, 4])

    Args:
        in_channels: number of channels of the input, at least 1.
        conv1x1: width of the 1x1 branch, at least 1.
        reduce_middle: width of the 1x1 in the middle branch, at least 1.
        middle: width of the 1x3 and of the 3x1 in the middle branch, at least 1. The branch gives ``2 * middle``
            channels.
        reduce_long: width of the 1x1 in the long branch, at least 1.
        long: width of the 3x3, of the 1x3 and of the 3x1 in the long branch, at least 1. The branch gives ``2 * long``
            channels.
        pool_proj: width of the 1x1 after the pooling, at least 1.
        conv: factory of a convolution with its norm and activation.
        dropout: factory of the module that acts on each branch's output, called without arguments.
    """

    def __init__(
        self,
        in_channels: int,
        conv1x1: int,
        reduce_middle: int,
        middle: int,
        reduce_long: int,
        long: int,
        pool_proj: int,
        *,
        conv: ConvFactory = ConvNormAct,
        dropout: DropoutMaker = nn.Identity,
    ) -> None:
        super().__init__(
            dropout,
            conv1x1=conv(in_channels, conv1x1, 1),
            middle=nn.Sequential(
                conv(in_channels, reduce_middle, 1),
                _SideBySide(conv(reduce_middle, middle, (1, 3)), conv(reduce_middle, middle, (3, 1))),
            ),
            long=nn.Sequential(
                conv(in_channels, reduce_long, 1),
                conv(reduce_long, long, 3),
                _SideBySide(conv(long, long, (1, 3)), conv(long, long, (3, 1))),
            ),
            pool=nn.Sequential(_average_pool(), conv(in_channels, pool_proj, 1)),
        )
        self.out_channels = conv1x1 + 2 * middle + 2 * long + pool_proj


class GridReduction(Branches):
    """Figure 10: stride-2 convolutions beside a stride-2 pooling halve the map and avoid a narrow layer.

    ``[N, in_channels, H, W] -> [N, middle + long + in_channels, (H - 1) // 2, (W - 1) // 2]``. The strided layers have
    no padding; H and W are at least 3.

    Example::

        >>> import torch
        >>> from project.models import GridReduction
        >>> block = GridReduction(288, 0, 384, 64, 96)  # block 6a of Inception v3
        >>> block(torch.rand(2, 288, 9, 9)).shape
        torch.Size([2, 768, 4, 4])

    Args:
        in_channels: number of channels of the input, at least 1. The pooling branch keeps all of them.
        reduce_middle: width of the 1x1 in the middle branch, 0 or more; 0 leaves this layer out.
        middle: width of the 3x3 of stride 2 in the middle branch, at least 1.
        reduce_long: width of the 1x1 in the long branch, at least 1.
        long: width of the kernel_size x kernel_size and of the 3x3 of stride 2 in the long branch, at least 1.
        kernel_size: side of the long branch's kernel, 3 as in the figure. A larger odd n becomes 1xn and nx1; n is 7 in
            the paper's published net.
        conv: factory of a convolution with its norm and activation.
        dropout: factory of the module that acts on each branch's output, called without arguments.
    """

    def __init__(
        self,
        in_channels: int,
        reduce_middle: int,
        middle: int,
        reduce_long: int,
        long: int,
        *,
        kernel_size: int = 3,
        conv: ConvFactory = ConvNormAct,
        dropout: DropoutMaker = nn.Identity,
    ) -> None:
        if kernel_size == 3:
            deep = _chain(conv, [in_channels, reduce_long, long], [1, 3])
        else:
            deep = _chain(conv, [in_channels, reduce_long, long, long], [1, (1, kernel_size), (kernel_size, 1)])
        before = [conv(in_channels, reduce_middle, 1)] if reduce_middle else []
        super().__init__(
            dropout,
            middle=nn.Sequential(*before, conv(reduce_middle or in_channels, middle, 3, 2, 0)),
            long=deep.append(conv(long, long, 3, 2, 0)),
            pool=MaxPool(3, stride=2),
        )
        self.out_channels = middle + long + in_channels


class _SideBySide(nn.ModuleList):
    """Modules on one input, whose outputs are concatenated along the channels."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(modules)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], dim=1)


def _chain(conv: ConvFactory, channels: list[int], kernel_sizes: list[int | tuple[int, int]]) -> nn.Sequential:
    """Convolutions one after another: ``channels[i] -> channels[i + 1]`` with ``kernel_sizes[i]``."""
    steps = zip(pairwise(channels), kernel_sizes, strict=True)
    return nn.Sequential(*(conv(fan_in, fan_out, kernel) for (fan_in, fan_out), kernel in steps))
