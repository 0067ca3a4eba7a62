"""The kernel against the algorithm step by step, in blocks of every size, with any number of threads."""

import pytest
import torch
from torch.nn.functional import conv2d

from project.compression.winograd.convolution import TILES, transform_weight, winograd_conv2d
from project.models.kernels import can_run_winograd, pack_panels, same_bits, winograd

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("out_channels", [1, 16, 17, 31, 32, 33, 48, 100])
def test_it_is_the_algorithm_for_any_number_of_channels(tile, out_channels):
    torch.manual_seed(0)
    for channels in (1, 7, 15, 16, 17, 40):
        x = torch.randn(2, channels, 9, 14).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(out_channels, channels, 3, 3), torch.randn(out_channels)
        panels = pack_panels(transform_weight(weight, tile))
        for own in (bias, None):
            y = winograd(x, panels, own, out_channels, tile, (1, 1))
            exact = winograd_conv2d(x.double(), weight.double(), None if own is None else own.double(), (1, 1), tile)
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()) * 4**tile / 16)


@pytest.mark.parametrize("tile", TILES)
def test_blocks_of_every_number_of_tiles(tile):
    """Rows in registers, from one to all, and the pieces of a block; many channels make small blocks."""
    torch.manual_seed(0)
    for channels, out_channels in ((8, 16), (300, 40)):
        weight = torch.randn(out_channels, channels, 3, 3)
        panels = pack_panels(transform_weight(weight, tile))
        for across in [*range(1, 31), 61]:
            x = torch.randn(1, channels, 3, across * tile).contiguous(memory_format=torch.channels_last)
            y, exact = winograd(x, panels, None, out_channels, tile, (1, 1)), conv2d(x, weight, padding=1)
            torch.testing.assert_close(y, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_threads_change_no_bit():
    torch.manual_seed(0)
    x = torch.randn(5, 24, 19, 13).contiguous(memory_format=torch.channels_last)
    panels = pack_panels(transform_weight(torch.randn(40, 24, 3, 3), 4))
    outputs = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        outputs.append(winograd(x, panels, None, 40, 4, (1, 1)))
    torch.set_num_threads(1)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_part_of_a_larger_map_and_other_orders_are_copied():
    torch.manual_seed(0)
    whole = torch.randn(4, 20, 12, 11).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    panels = pack_panels(transform_weight(weight, 2))
    for x in (whole[:, 2:18], whole[1:, :16, 2:-1], whole[:, :16].contiguous(), whole[::2, :16].transpose(2, 3)):
        assert can_run_winograd(x, weight, None, (1, 1))
        torch.testing.assert_close(
            winograd(x, panels, None, 8, 2, (1, 1)), conv2d(x, weight, padding=1), atol=1e-4, rtol=0
        )


def test_not_a_number_stays_in_its_tile():
    x = torch.randn(1, 4, 12, 12).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 4, 3, 3)
    x[0, 1, 5, 6] = torch.nan
    y = winograd(x, pack_panels(transform_weight(weight, 4)), None, 8, 4, (1, 1))
    tiles = y.isnan().unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).any(dim=4)[0]
    assert tiles[:, 1, 1].all() and int(tiles.sum()) == 8


def test_bits_are_compared():
    one = torch.randn(3, 4).t()
    assert same_bits(one, one.clone())
    for other in (one.contiguous(), one[:2], one.double(), one.clone().mul_(1 + 1e-6)):
        assert not same_bits(one, other)
    assert not same_bits(torch.zeros(2), -torch.zeros(2)) and same_bits(
        torch.full((2,), torch.nan), torch.full((2,), torch.nan)
    )
