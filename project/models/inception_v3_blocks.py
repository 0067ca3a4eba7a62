"""The blocks of Inception v3: large convolutions as stacks of small or one-sided ones.

Rethinking the Inception architecture for computer vision, Szegedy et al. 2015 (arXiv:1512.00567): figure 5 (5x5 as two
3x3, section 3.1), figure 6 (nxn as 1xn and nx1, section 3.2), figure 7 (expanded filter bank, section 6), figure 10
(grid reduction, section 5). The pooling that keeps the size is an average, as in the paper's code and torchvision; the
figures say "Pool" only.

``conv`` and ``dropout`` as in :mod:`project.models.inception_blocks`. Widths are named after the branch they belong
to: 1x1, middle, long, pooling, the order in the output.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from project.models.inception_blocks import Branches, DropoutMaker
from project.models.layers import ConvFactory, ConvNormAct, MaxPool

_average_pool = partial(nn.AvgPool2d, 3, stride=1, padding=1)


class FactorizedInception(Branches):
    """Figure 5: the 5x5 of figure 4 (figure 2b of the first paper) as two 3x3, 18/25 of its cost at equal widths.

    Args:
        in_channels: channels of the input.
        conv1x1: width of the 1x1 branch.
        reduce_middle, middle: 1x1 and kernel_size x kernel_size of the middle branch.
        reduce_long, long: 1x1 and each of the two 3x3 of the long branch.
        pool_proj: 1x1 after the pooling.
        kernel_size: side of the middle branch's kernel; 3 in the figure, 5 in the paper's published net (and
            torchvision's).
        conv, dropout: see the module.
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
    """Figure 6: nxn as 1xn then nx1, at 2/n of the cost; the middle branch sees nxn pixels, the long one (2n-1)x(2n-1).

    Args:
        in_channels: channels of the input.
        conv1x1: width of the 1x1 branch.
        reduce: width inside the middle and long branches.
        middle, long: widths at the end of these branches.
        pool_proj: 1x1 after the pooling.
        kernel_size: n, odd; the paper takes 7 on 17x17 maps.
        conv, dropout: see the module.
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
    """Figure 7: 1x3 and 3x1 side by side at the end of a branch, for wide representations on the coarsest (8x8) maps.

    Args:
        in_channels: channels of the input.
        conv1x1: width of the 1x1 branch.
        reduce_middle, middle: 1x1 of the middle branch; each of its 1x3 and 3x1, so that it gives ``2 * middle``.
        reduce_long, long: 1x1 of the long branch; its 3x3 and each of its 1x3 and 3x1, so that it gives ``2 * long``.
        pool_proj: 1x1 after the pooling.
        conv, dropout: see the module.
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
    """Figure 10: stride-2 convolutions beside a stride-2 pooling halve the map without a narrow layer on the way.

    ``[N, in_channels, H, W] -> [N, middle + long + in_channels, (H - 1) // 2, (W - 1) // 2]``, unpadded, H and W at
    least 3.

    Args:
        in_channels: channels of the input, all kept by the pooling branch.
        reduce_middle, middle: 1x1 (0: none) and 3x3 of stride 2.
        reduce_long, long: 1x1, then kernel_size x kernel_size, then 3x3 of stride 2.
        kernel_size: 3 as in the figure; an odd n above 3 becomes 1xn and nx1 (7 in the paper's published net).
        conv, dropout: see the module.
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
    """Modules on one input, concatenated along the channels."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(modules)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], dim=1)


def _chain(conv: ConvFactory, channels: list[int], kernel_sizes: list[int | tuple[int, int]]) -> nn.Sequential:
    """Convolutions one after another: ``channels[i] -> channels[i + 1]`` with ``kernel_sizes[i]``."""
    steps = zip(pairwise(channels), kernel_sizes, strict=True)
    return nn.Sequential(*(conv(fan_in, fan_out, kernel) for (fan_in, fan_out), kernel in steps))
