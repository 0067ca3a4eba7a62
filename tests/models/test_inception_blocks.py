import pytest
import torch
from torch import nn

from project.metrics.complexity import count_macs, count_parameters
from project.models import DropPath, Inception, NaiveInception, NoNorm, ReLU
from project.models.inception_blocks import Branches
from project.models.layers import ConvNormAct, conv_factory

BLOCKS = {
    "figure 2a": (NaiveInception, (8, 16, 4), {}, 8 + 16 + 4 + 10),
    "figure 2b": (Inception, (8, 6, 16, 2, 4, 5), {}, 8 + 16 + 4 + 5),
    "figure 2b factorized": (Inception, (8, 6, 16, 2, 4, 5), {"factorized": True}, 8 + 16 + 4 + 5),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("side", [1, 7, 8])
def test_blocks_keep_the_size_and_say_their_width(name: str, side: int) -> None:
    block_class, widths, options, out_channels = BLOCKS[name]
    block = block_class(10, *widths, **options)
    assert block.out_channels == out_channels
    assert block(torch.randn(2, 10, side, side + 1)).shape == (2, out_channels, side, side + 1)


def weights(net: nn.Module) -> int:
    """Of convolutions, without biases and norms: the paper's count."""
    return sum(module.weight.numel() for module in net.modules() if isinstance(module, nn.Conv2d))


def test_bottlenecks_of_block_3a_cost_less_than_half() -> None:
    naive = NaiveInception(192, 64, 128, 32)
    bottleneck = Inception(192, 64, 96, 128, 16, 32, 32)
    assert (weights(naive), weights(bottleneck)) == (387_072, 163_328)
    assert naive.out_channels == 64 + 128 + 32 + 192, "and the pooling branch of the naive block widens the next one"


def test_bottleneck_makes_the_5x5_branch_of_3a_ten_times_cheaper() -> None:
    naive = NaiveInception(192, 64, 128, 32).branches["conv5x5"]
    bottleneck = Inception(192, 64, 96, 128, 16, 32, 32).branches["conv5x5"]
    shape = (192, 28, 28)
    assert (count_macs(naive, shape), count_macs(bottleneck, shape)) == (120_422_400, 12_443_648)


def test_two_3x3_cost_18_25ths_of_a_5x5() -> None:
    shape = (32, 14, 14)
    conv = conv_factory(NoNorm, ReLU)
    single, double = conv(32, 32, 5), nn.Sequential(conv(32, 32, 3), conv(32, 32, 3))
    assert count_macs(double, shape) * 25 == count_macs(single, shape) * 18
    assert weights(double) * 25 == weights(single) * 18


@pytest.mark.parametrize("n", [3, 7])
def test_one_sided_pairs_cost_2_nths_of_a_square(n: int) -> None:
    shape = (8, 17, 17)
    pair = nn.Sequential(ConvNormAct(8, 8, (1, n)), ConvNormAct(8, 8, (n, 1)))
    assert count_macs(pair, shape) * n == count_macs(ConvNormAct(8, 8, n), shape) * 2


@pytest.mark.parametrize(
    ("block", "branch", "side"),
    [
        (Inception(4, 1, 1, 1, 2, 2, 1, conv=conv_factory(NoNorm, nn.Identity)), "conv5x5", 5),
        (Inception(4, 1, 1, 1, 2, 2, 1, factorized=True, conv=conv_factory(NoNorm, nn.Identity)), "conv5x5", 5),
    ],
)
def test_branches_see_the_pixels_that_the_figure_gives_them(block: Branches, branch: str, side: int) -> None:
    image = torch.zeros(1, 4, 21, 21, requires_grad=True)
    block.branches[branch](image)[:, :, 10, 10].square().sum().backward()
    block.branches[branch](image)[:, :, 10, 10].sum().backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert rows.tolist() == columns.tolist() == list(range(10 - side // 2, 10 + side // 2 + 1))


def test_each_branch_has_its_own_dropout_and_drop_path_drops_whole_branches() -> None:
    torch.manual_seed(0)
    block = Inception(4, 8, 4, 8, 4, 8, 8, conv=conv_factory(NoNorm, nn.Softplus), dropout=lambda: DropPath(0.5))
    kept = block(torch.randn(64, 4, 6, 6)).unflatten(1, (4, 8)) > 0
    per_branch = kept.flatten(2).float().mean(2)
    assert set(per_branch.unique().tolist()) == {0.0, 1.0}
    assert len({tuple(row) for row in per_branch.tolist()}) > 8, "branches are dropped independently"


def test_norm_activation_and_pooling_are_handed_in() -> None:
    block = Inception(
        4, 8, 4, 8, 4, 8, 8, pool=lambda: nn.AvgPool2d(3, 1, 1), conv=conv_factory(nn.BatchNorm2d, nn.SiLU)
    )
    kinds = {type(module) for module in block.modules()}
    assert {nn.AvgPool2d, nn.BatchNorm2d, nn.SiLU} <= kinds and nn.MaxPool2d not in kinds
    assert count_parameters(block) == weights(block) + 2 * (8 + 4 + 8 + 4 + 8 + 8)
