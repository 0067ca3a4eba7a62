"""GoogLeNet against table 1 of Szegedy et al. 2014, cell by cell."""

import pytest
import torch
from torch import nn

from project.metrics.complexity import complexity_by_layer, count_macs, count_parameters
from project.models import BatchNorm, BNGoogLeNet, GoogLeNet, NoNorm

K, M = 1024, 1_000_000

# type: (#1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj), input channels, side of the map, params in K, ops in M
BLOCKS = {
    "3a": ((64, 96, 128, 16, 32, 32), 192, 28, 159, 128),
    "3b": ((128, 128, 192, 32, 96, 64), 256, 28, 380, 304),
    "4a": ((192, 96, 208, 16, 48, 64), 480, 14, 364, 73),
    "4b": ((160, 112, 224, 24, 64, 64), 512, 14, 437, 88),
    "4c": ((128, 128, 256, 24, 64, 64), 512, 14, 463, 100),
    "4d": ((112, 144, 288, 32, 64, 64), 512, 14, 580, 119),
    "4e": ((256, 160, 320, 32, 128, 128), 528, 14, 840, 170),
    "5a": ((256, 160, 320, 32, 128, 128), 832, 7, 1072, 54),
    "5b": ((384, 192, 384, 48, 128, 128), 832, 7, 1388, 71),
}
PRINTED = {
    "7x7": (2.7, 34),
    "3x3": (112, 360),
    **{name: (params, ops) for name, (*_, params, ops) in BLOCKS.items()},
    "linear": (1000, 1),
}
# The paper's slips: what the table's own widths give (params in K, ops in M). All other cells agree to the last digit.
PARAMS_SLIPS = {
    "7x7": 9.19,
    "3b": 379.0,
    "4a": 366.75,
    "4b": 438.0,
    "4c": 497.5,
    "4d": 590.5,
    "4e": 847.0,
    "5a": 1018.0,
    "5b": 1409.0,
}
OPS_SLIPS = {"7x7": 118.01, "4a": 73.61, "5a": 51.08}


def block_weights(in_channels: int, widths: tuple[int, ...]) -> int:
    conv1x1, reduce3x3, conv3x3, reduce5x5, conv5x5, pool_proj = widths
    return (
        in_channels * (conv1x1 + reduce3x3 + reduce5x5 + pool_proj)
        + 3 * 3 * reduce3x3 * conv3x3
        + 5 * 5 * reduce5x5 * conv5x5
    )


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    """Row of the table -> (weights without biases, multiply-adds) of the net itself."""
    with torch.device("meta"):
        net = GoogLeNet(1000, (3, 224, 224), weight_init=lambda weight: weight)
    counts = dict.fromkeys(PRINTED, (0, 0))
    modules = dict(net.named_modules())
    for row in complexity_by_layer(net, (3, 224, 224)):
        if row.name.startswith("blocks."):
            name = row.name.split(".")[1].removeprefix("inception_")
        else:
            name = {"fc": "linear", "stem.conv1.conv": "7x7"}.get(row.name, "3x3")
        weights, macs = counts[name]
        counts[name] = (weights + modules[row.name].weight.numel(), macs + row.macs)
    return counts


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_the_arithmetic_of_the_table_s_widths(name: str, measured: dict[str, tuple[int, int]]) -> None:
    widths, in_channels, side, *_ = BLOCKS[name]
    weights = block_weights(in_channels, widths)
    assert measured[name] == (weights, weights * side * side)


def test_stem_and_head_are_the_arithmetic_of_the_table_s_widths(measured: dict[str, tuple[int, int]]) -> None:
    assert measured["7x7"] == (7 * 7 * 3 * 64, 7 * 7 * 3 * 64 * 112 * 112)
    assert measured["3x3"] == (64 * 64 + 9 * 64 * 192, (64 * 64 + 9 * 64 * 192) * 56 * 56)
    assert measured["linear"] == (1024 * 1000, 1024 * 1000)


@pytest.mark.parametrize("name", PRINTED)
def test_params_column(name: str, measured: dict[str, tuple[int, int]]) -> None:
    """Rounded to whole K = 1024 weights (3a lies at 159.5, so half a unit either way is one rounding)."""
    ours = measured[name][0] / K
    assert (abs(ours - PRINTED[name][0]) <= 0.5) == (name not in PARAMS_SLIPS)
    assert ours == pytest.approx(PARAMS_SLIPS.get(name, ours), abs=0.005)


@pytest.mark.parametrize("name", PRINTED)
def test_ops_column(name: str, measured: dict[str, tuple[int, int]]) -> None:
    ours = measured[name][1] / M
    assert (round(ours) == PRINTED[name][1]) == (name not in OPS_SLIPS)
    assert ours == pytest.approx(OPS_SLIPS.get(name, ours), abs=0.005)


def test_first_row_is_that_of_a_separable_convolution() -> None:
    """Depth multiplier 8 gives both printed numbers, 2.7K and 34M; K is 1000 or 1024."""
    weights = 7 * 7 * 3 * 8 + (3 * 8) * 64
    assert f"{weights / K:.1f}" == "2.6" and f"{weights / 1000:.1f}" == "2.7"
    assert round(weights * 112 * 112 / M) == 34


def test_printed_ops_sum_to_the_paper_s_1_5_billion(measured: dict[str, tuple[int, int]]) -> None:
    assert sum(ops for _, ops in PRINTED.values()) == 1502
    total = sum(macs for _, macs in measured.values())
    assert total == 1_582_671_872
    assert total - measured["7x7"][1] + 34 * M == pytest.approx(1.5e9, rel=0.002)


def test_maps_have_the_table_s_sizes() -> None:
    with torch.device("meta"):
        net = GoogLeNet(1000, (3, 224, 224), weight_init=lambda weight: weight)
        x = net.stem(torch.zeros(1, 3, 224, 224))
        assert x.shape == (1, 192, 28, 28)
        sizes = {}
        for name, block in net.blocks.named_children():
            x = block(x)
            sizes[name] = tuple(x.shape[1:])
    figure_3 = ["conv1", "pool1", "norm1", "conv2_reduce", "conv2", "norm2", "pool2"]
    assert [name for name, _ in net.stem.named_children()] == figure_3
    assert sizes["inception_3b"] == (480, 28, 28)
    assert sizes["pool_4"] == (480, 14, 14)
    assert sizes["inception_4e"] == (832, 14, 14)
    assert sizes["inception_5b"] == (1024, 7, 7)
    assert isinstance(net.dropout, nn.Dropout) and net.dropout.p == 0.4


def test_batch_norm_version_differs_in_norms_and_dropout_alone() -> None:
    with torch.device("meta"):
        v1 = GoogLeNet(10, (3, 32, 32), weight_init=lambda weight: weight)
        bn = BNGoogLeNet(10, (3, 32, 32), weight_init=lambda weight: weight)
        factorized = BNGoogLeNet(10, (3, 32, 32), factorized=True, weight_init=lambda weight: weight)
    convolutions = [module for module in v1.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 3 + 9 * 6
    kinds = [{type(module) for module in net.modules()} for net in (v1, bn)]
    assert nn.LocalResponseNorm in kinds[0] and not {BatchNorm, nn.BatchNorm2d} & kinds[0] and NoNorm in kinds[0]
    assert BatchNorm in kinds[1] and not {nn.LocalResponseNorm, nn.Dropout, NoNorm} & kinds[1]
    # A bias less and a scale and a shift more for each channel.
    assert count_parameters(bn) - count_parameters(v1) == sum(module.out_channels for module in convolutions)
    assert count_macs(bn, (3, 32, 32)) == count_macs(v1, (3, 32, 32))
    # Ioffe & Szegedy, appendix: the largest kernel as two 3x3 deepens the net by nine layers.
    assert len([module for module in factorized.modules() if isinstance(module, nn.Conv2d)]) == len(convolutions) + 9


def test_state_dict_keys_are_stable() -> None:
    with torch.device("meta"):
        keys = list(GoogLeNet(10, (3, 32, 32), weight_init=lambda weight: weight).state_dict())
    assert len(keys) == 2 * (3 + 9 * 6 + 1)
    assert keys[:4:2] == ["stem.conv1.conv.weight", "stem.conv2_reduce.conv.weight"]
    assert "blocks.inception_3a.branches.conv1x1.conv.weight" in keys
    assert "blocks.inception_5b.branches.conv5x5.1.conv.weight" in keys
    assert keys[-2:] == ["fc.weight", "fc.bias"]
