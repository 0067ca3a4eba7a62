"""Which layers are chosen: within the error, beyond the noise, and not where the whole net gains nothing."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.nets import NETS, build, images_for
from helpers.subclasses import Mixed
from torch import nn

from project import models
from project.compression import Winograd, WinogradChooser, WinogradConv2d
from project.compression.winograd.choice import ERROR_LIMITS, relative_errors
from project.compression.winograd.convolution import TILES
from project.models.kernels.build import library


def net_and_images() -> tuple[nn.Module, torch.Tensor]:
    return build("SmallInception-8").eval().to(memory_format=torch.channels_last), images_for("SmallInception-8")


class Clock(WinogradChooser):
    """Reports made-up milliseconds: of direct convolution, F(2x2, 3x3) and F(4x4, 3x3); of the net before and after."""

    def _times(self, runs: Sequence[Any]) -> list[list[float]]:
        for run in runs:
            run()
        direct, *others = {3: self.layer_ms, 2: self.net_ms}[len(runs)]  # type: ignore[attr-defined]
        return [[ms - 0.1, ms, ms, ms, ms + 0.1, 99 * ms] for ms in (direct, *others)]  # someone else ran in the last


def clock(layer_ms: tuple[float, ...], net_ms: tuple[float, ...] = (2.0, 1.0), **options: Any) -> Clock:
    chooser = Clock(**options)
    object.__setattr__(chooser, "layer_ms", layer_ms)
    object.__setattr__(chooser, "net_ms", net_ms)
    return chooser


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("layer_ms", "net_ms", "kept", "reason"),
    [
        ((3, 2, 1), (9, 8), {4}, ""),
        ((3, 1, 2), (9, 8), {2}, ""),
        ((1, 2, 3), (9, 8), set(), "it is not faster"),
        ((3, 2.95, 2.97), (9, 8), set(), "it is not faster"),  # within the noise
        ((3, 2, 1), (9, 8.95), set(), "the whole net is not faster"),
        ((3, 2, 1), (8, 9), set(), "the whole net is not faster"),
    ],
)
def test_what_wins_beyond_the_noise_is_kept(layer_ms, net_ms, kept, reason):
    net, images = net_and_images()
    before = deepcopy(net.state_dict())
    plan = clock(layer_ms, net_ms, exclude=["stem"]).plan(net, images)
    assert len(plan.rows) == 3 and {row.reason for row in plan.rows} == {reason}
    assert set(plan.surgery.tiles.values()) == kept and len(plan.surgery.tiles) == (3 if kept else 0)
    assert (plan.direct_ms, plan.ms) == net_ms  # whatever the disturbed rounds took
    assert not any(isinstance(layer, WinogradConv2d) for layer in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.usefixtures("kernels")
def test_a_layer_beyond_the_error_is_listed_and_not_kept(monkeypatch):
    net, images = net_and_images()
    monkeypatch.setitem(ERROR_LIMITS, 4, 1.0)
    plan = clock((3, 2, 1), exclude=["stem"]).plan(net, images)
    assert list(plan.surgery.tiles.values()) == [2] * 3, "the other tile still may win"
    for algorithm, chosen in (("f4", 0), ("f2", 3)):
        rows = clock((3, 2, 1), algorithm=algorithm, exclude=["stem"]).plan(net, images).rows
        assert sum(row.kept is not None for row in rows) == chosen
        assert all("error is too large" in str(row) for row in rows if row.kept is None)


@pytest.mark.usefixtures("kernels")
def test_a_tile_that_is_asked_for_is_taken_without_a_race():
    net, images = net_and_images()
    plan = clock((1, 2, 3), (1, 2), algorithm="f4", exclude=["stem"], include=["conv3x3", "m"]).plan(net, images)
    assert plan.surgery == Winograd({"blocks.1.branches.conv3x3.1.conv": 4})


@pytest.mark.usefixtures("kernels")
def test_shapes_times_and_errors_are_of_the_net_as_it_runs():
    net, images = net_and_images()
    shapes = {}

    def note(name, x, output):
        shapes[name] = (*x.shape, output.shape[1])

    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, args, output, name=name: note(name, args[0], output))
    Winograd({"stem.0.conv": 2}).apply_(net)
    plan = WinogradChooser(rounds=2).plan(net, images)
    assert {row.name: row.shape for row in plan.rows}.items() <= shapes.items() | {("stem.0.conv", (8, 1, 8, 8, 16))}
    for row in plan.rows:
        assert set(row.ms) == {0, *TILES} and min(row.ms.values()) > 0
        assert row.saved[2] <= 2.25 and row.saved[4] <= 4 and (row.kept is None) == bool(row.reason)
    assert {row.name: row.kept for row in plan.rows if row.kept} == plan.surgery.tiles


def test_without_a_kernel_everything_stays_direct(monkeypatch):
    net, images = net_and_images()
    with torch.inference_mode():
        expected = net(images)
    library.cache_clear()
    monkeypatch.setenv("PROJECT_KERNELS", "0")
    for algorithm in ("auto", "f4"):
        plan = WinogradChooser(algorithm, rounds=1).plan(net, images)
        assert not plan.surgery.tiles and {row.reason for row in plan.rows} == {"there is no kernel for its inputs"}
    tiles = {row.name: 4 for row in plan.rows}
    Winograd(tiles).apply_(net)  # as another machine chose
    with torch.inference_mode():
        assert torch.equal(net(images), expected)
    library.cache_clear()


@pytest.mark.usefixtures("kernels")
def test_damaged_weights_and_empty_ones():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        conv.weight.zero_()
        assert all(error <= ERROR_LIMITS[tile] for tile, error in relative_errors(conv, x).items())
        conv.weight[0, 0, 0, 0] = torch.nan
        assert not any(error <= ERROR_LIMITS[tile] for tile, error in relative_errors(conv, x).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "f6"}, "algorithm is 'f6': choose auto, f2 or f4"),
        ({"batch_size": 0}, "batch_size is 0 and rounds is 20: choose at least 1"),
        ({"rounds": 0}, "rounds is 0: choose at least 1"),
        ({"include": ["conv9x9"]}, "include has 'conv9x9', which finds no convolution"),
        ({"exclude": ["conv9x9"]}, "exclude has 'conv9x9', which finds no convolution"),
        ({"include": ["conv1x1"]}, "SmallInception has no convolution of 3x3 with stride 1"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(options, message):
    net, _ = net_and_images()
    with pytest.raises(ValueError, match=message):
        WinogradChooser(**options).layers(net)


def test_a_net_without_such_layers_is_refused():
    with pytest.raises(ValueError, match=r"LeNet300100 has no convolution of 3x3 with stride 1.*leave it out"):
        WinogradChooser().layers(models.LeNet300100(5, NETS["LeNet300100-9x5"][1]))


def test_a_subclass_is_not_chosen_and_not_replaced() -> None:
    net = Mixed(encoder=False)
    assert list(WinogradChooser().layers(net)) == ["stem", "plain"]
    with pytest.raises(ValueError, match="has no convolution standard"):
        Winograd({"standard": 4}).apply_(net)
