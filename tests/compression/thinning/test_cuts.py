"""A thinned net whose source code still states the old sizes of its splits goes through everything as other nets do."""

import io
import pickle
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coupled_nets import SHAPE, Do, around, conv
from helpers.nets import assert_same_logits, choose
from helpers.split_net import Part, SplitNet
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from project.compression.thinning.cuts import cut_
from project.compression.thinning.units import look_at_units, masked_net, plan_thinning, units_of
from project.deployment.export import Format, export
from project.deployment.metadata import Metadata
from project.deployment.recipe import Recipe
from project.models.surgery import replay_, to_plain

IMAGES = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))


def build(seed: int = 0) -> SplitNet:
    torch.manual_seed(seed)
    return SplitNet().eval()


@cache
def thinned() -> tuple[nn.Module, list[dict[str, Any]]]:
    """The net after two rounds, and the plain values of both."""
    net, surgeries = build(), []
    for _ in range(2):
        plan = plan_thinning(net, choose(units_of(net, SHAPE), 0.4), SHAPE)
        plan.apply_(net)
        surgeries.append(to_plain(plan))
    return net, surgeries


def test_all_layers_lose_units_in_both_rounds() -> None:
    net, surgeries = thinned()
    assert look_at_units(net, SHAPE)[1].keys() == {"head"}
    assert net.a.in_channels < 8 and net.b.in_channels < 16 and net.part.conv.out_channels <= 6
    assert [each["cuts"].keys() for each in surgeries] == [{"", "part"}] * 2
    first, second = (each["cuts"][""] for each in surgeries)
    assert [cut[:3] for cut in first] == [["split", 1, [8, 16]], ["chunk", 1, 3]]
    assert [sizes for *_, sizes in first] == [stated for _, _, stated, _ in second], "it starts from the present sizes"


def test_class_and_names_are_those_of_the_net() -> None:
    net, _ = thinned()
    assert isinstance(net, SplitNet) and isinstance(net.part, Part)
    assert (type(net).__name__, type(net).__module__) == ("SplitNet", SplitNet.__module__)
    assert net.state_dict().keys() == build().state_dict().keys() and repr(net).startswith("SplitNet(")
    assert type(build()) is SplitNet, "other nets of the class stay"


def by_checkpoint(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save({"surgeries": thinned()[1], "state_dict": net.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = build(seed=4)
    replay_(fresh, saved["surgeries"])
    fresh.load_state_dict(saved["state_dict"])
    return fresh.eval()


@pytest.mark.parametrize("copied", [deepcopy, lambda net: pickle.loads(pickle.dumps(net)), by_checkpoint])
def test_copies_compute_the_same_and_can_be_thinned_again(copied: Any) -> None:
    net = thinned()[0]
    copy = copied(net)
    assert type(copy) is type(net) and torch.equal(copy(IMAGES), net(IMAGES))
    sizes = dict(net.sizes_of_cuts)
    removed = choose(units_of(copy, SHAPE), 0.4)
    masked = masked_net(copy, removed, SHAPE)
    plan_thinning(copy, removed, SHAPE).apply_(copy)
    assert_same_logits(masked, copy, IMAGES)
    assert net.sizes_of_cuts == sizes != copy.sizes_of_cuts


def test_an_error_in_the_forward_pass_leaves_no_mode() -> None:
    with pytest.raises(RuntimeError):
        thinned()[0](torch.zeros(1, 4, 8, 8))
    assert not _get_current_function_mode_stack()


def test_calls_that_are_valid_as_they_stand_do_not_change() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> list[tuple[int, ...]]:
            parts = (*x.split([8, 16], 1), *y.split((8, 16), dim=1), *y.split([8, 16], -1), *x.split(6, 1))
            return [tuple(each.shape) for each in parts]

    module = Two()
    cut_(module, [["split", 1, [8, 16], [3, 9]], ["split", 1, 6, [1, 1, 1]]])
    x, y = torch.zeros(1, 12, 24), torch.zeros(1, 24, 24)
    expected = [(1, 3, 24), (1, 9, 24), (1, 8, 24), (1, 16, 24), (1, 24, 8), (1, 24, 16), (1, 6, 24), (1, 6, 24)]
    assert module(x, y) == expected


@pytest.mark.parametrize("format", ["pt2", "packed", pytest.param("onnx-int8", marks=pytest.mark.slow)])
def test_files_hold_the_thinned_net(format: Format, tmp_path: Path) -> None:
    net, surgeries = thinned()
    recipe = Recipe({"class_path": "helpers.split_net.SplitNet", "init_args": {"num_classes": 5}}, surgeries)
    metadata = Metadata(tuple("abcde"), SHAPE, (0.0,) * 3, (1.0,) * 3)
    path = tmp_path / f"net.{format.partition('-')[0]}"
    write = partial(export, net, path, metadata, IMAGES, format=format, recipe=recipe if format == "packed" else None)
    assert write(calibration=IMAGES).path == path, "its logits are compared with those of the net"


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled(in_place: bool) -> None:
    """Also if the net was compiled before it was thinned."""
    net = build()
    if in_place:
        net.compile(fullgraph=True, backend="aot_eager")
        net(IMAGES)
    replay_(net, thinned()[1])
    net.load_state_dict(thinned()[0].state_dict())
    run = net if in_place else torch.compile(net, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(IMAGES), thinned()[0](IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_training", [False, True])
def test_a_function_that_is_repeated_in_the_backward_pass_keeps_its_channels(in_training: bool) -> None:
    """It would run outside of the module's forward pass, with the old numbers."""

    def take(y: Tensor) -> Tensor:
        return torch.cat([y[:, 8:], y[:, :8].relu()], 1)

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.last(checkpoint(take, y, use_reentrant=False) if m.training or not in_training else take(y))

    net = around(Do(forward, conv=conv(8, 12), last=conv(12, 8)))
    units, reasons = look_at_units(net, SHAPE)
    assert reasons.keys() == {"block.conv", "head"} and "checkpoint" in reasons["block.conv"]
    plan_thinning(net, choose(units, 0.5), SHAPE).apply_(net)
    net.train()(IMAGES).sum().backward()
