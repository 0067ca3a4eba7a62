"""The factorised blocks of Inception v3: sizes, widths, and the pixels that each branch sees."""

import pytest
import torch
from torch import nn

from project.models import AsymmetricInception, ExpandedInception, FactorizedInception, GridReduction, NoNorm
from project.models.inception_blocks import Branches
from project.models.layers import conv_factory

BLOCKS = {
    "figure 5": (FactorizedInception, (8, 6, 16, 2, 4, 5), {}, 8 + 16 + 4 + 5),
    "figure 5, 5x5": (FactorizedInception, (8, 6, 16, 2, 4, 5), {"kernel_size": 5}, 8 + 16 + 4 + 5),
    "figure 6": (AsymmetricInception, (8, 6, 9, 11, 5), {}, 8 + 9 + 11 + 5),
    "figure 6, n = 3": (AsymmetricInception, (8, 6, 9, 11, 5), {"kernel_size": 3}, 8 + 9 + 11 + 5),
    "figure 7": (ExpandedInception, (8, 6, 9, 7, 11, 5), {}, 8 + 2 * 9 + 2 * 11 + 5),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("side", [1, 7, 8])
def test_blocks_keep_the_size_and_say_their_width(name: str, side: int) -> None:
    block_class, widths, options, out_channels = BLOCKS[name]
    block = block_class(10, *widths, **options)
    assert block.out_channels == out_channels
    assert block(torch.randn(2, 10, side, side + 1)).shape == (2, out_channels, side, side + 1)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 7}])
@pytest.mark.parametrize("reduce_middle", [0, 6])
@pytest.mark.parametrize("side", [3, 8, 35])
def test_grid_reduction_halves_the_map_and_keeps_the_input_channels(
    side: int, reduce_middle: int, options: dict[str, int]
) -> None:
    block = GridReduction(10, reduce_middle, 16, 4, 7, **options)
    assert block(torch.randn(2, 10, side, 9)).shape == (2, block.out_channels, (side - 1) // 2, 4)
    assert block.out_channels == 16 + 7 + 10


@pytest.mark.parametrize(
    ("block", "branch", "side"),
    [
        (FactorizedInception(4, 1, 1, 1, 2, 2, 1, conv=conv_factory(NoNorm, nn.Identity)), "long", 5),
        (AsymmetricInception(4, 1, 2, 2, 2, 1, conv=conv_factory(NoNorm, nn.Identity)), "middle", 7),
        (AsymmetricInception(4, 1, 2, 2, 2, 1, conv=conv_factory(NoNorm, nn.Identity)), "long", 13),
        (ExpandedInception(4, 1, 2, 2, 2, 2, 1, conv=conv_factory(NoNorm, nn.Identity)), "middle", 3),
        (ExpandedInception(4, 1, 2, 2, 2, 2, 1, conv=conv_factory(NoNorm, nn.Identity)), "long", 5),
    ],
)
def test_branches_see_the_pixels_that_the_figure_gives_them(block: Branches, branch: str, side: int) -> None:
    image = torch.zeros(1, 4, 21, 21, requires_grad=True)
    block.branches[branch](image)[:, :, 10, 10].square().sum().backward()
    block.branches[branch](image)[:, :, 10, 10].sum().backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert rows.tolist() == columns.tolist() == list(range(10 - side // 2, 10 + side // 2 + 1))
