"""For each way in which units are coupled: the thinned net computes what the masked one does, and it can be saved."""

import io
import re
import time
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from helpers.coupled_nets import ROWS, SHAPE, Heads, on_tokens
from helpers.nets import assert_same_logits, choose, depends_on_images
from helpers.random_nets import random_net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from project.compression.pruning.unit_budget import Macs
from project.compression.thinning import units as units_module
from project.compression.thinning.masked import MaskedNet
from project.compression.thinning.thin import Thin, sliced
from project.compression.thinning.units import Units, look_at_units, masked_net, plan_thinning, units_of
from project.models.surgery import replay_, to_plain


class Case(NamedTuple):
    """A lively net, the net with zeros for half of its units, and the net without them."""

    net: nn.Module
    units: dict[str, Units]
    reasons: dict[str, str]
    masked: MaskedNet
    plan: Thin
    thinned: nn.Module


@torch.no_grad()
def lively(net: nn.Module) -> nn.Module:
    """The net with random biases, norms and running statistics, so that its logits depend on the image."""
    for key, parameter in net.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_("bias" not in key, 0.3)
        else:
            parameter.mul_(2)
    for key, buffer in net.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return net


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lively(ROWS[name].make())


@cache
def case(name: str) -> Case:
    net = build(name)
    units, reasons = look_at_units(net, SHAPE)
    removed = choose(units, 0.5)
    plan = plan_thinning(net, removed, SHAPE)
    thinned = deepcopy(net)
    plan.apply_(thinned)
    return Case(net, units, reasons, masked_net(net, removed, SHAPE), plan, thinned)


def images() -> Tensor:
    """Eight images, each of a larger scale than the one before, so that their logits differ."""
    scales = 1.5 ** torch.arange(8).view(-1, 1, 1, 1)
    return scales * torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ROWS)
def test_all_units_go_that_can_and_the_others_have_a_reason(name: str) -> None:
    net, units, reasons, *_ = case(name)
    kinds = nn.modules.conv._ConvNd | nn.Linear | nn.MultiheadAttention
    layers = {layer for layer, module in net.named_modules() if isinstance(module, kinds)}
    gone = {layer for each in units.values() for layer in each.layers}
    inner = {layer for layer in layers if layer.endswith("out_proj")}  # a part of attention
    assert layers - gone - inner == reasons.keys() - inner == ROWS[name].stays | {"head"}
    assert all(reasons.values())


@pytest.mark.parametrize("name", ROWS)
def test_logits_are_those_of_the_masked_net(name: str) -> None:
    _, _, _, masked, _, thinned = case(name)
    assert_same_logits(masked, thinned, images())


@pytest.mark.parametrize("name", ROWS)
def test_a_training_step_is_that_of_the_masked_net(name: str) -> None:
    """Gradients, and the running statistics after it."""
    _, _, _, masked, plan, thinned = case(name)
    masked, thinned = deepcopy(masked).double().train(), deepcopy(thinned).double().train()
    labels = torch.arange(8) % 5
    for net in (masked, thinned):
        nn.functional.cross_entropy(net(images().double()), labels).backward()
    whole = dict(masked.net.named_parameters())
    largest = max(float(each.grad.abs().max()) for each in whole.values())
    for key, parameter in thinned.named_parameters():
        expected = sliced(whole[key].grad, plan.slices.get(key, []))
        assert (parameter.grad - expected).abs().max() <= 1e-9 * largest, key
    whole = dict(masked.net.named_buffers())
    for key, buffer in thinned.named_buffers():
        torch.testing.assert_close(buffer, sliced(whole[key], plan.slices.get(key, [])), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_a_second_round_and_a_saved_net(name: str) -> None:
    *_, first, once = case(name)
    removed = choose(units_of(once, SHAPE), 0.4)
    masked, second, twice = masked_net(once, removed, SHAPE), plan_thinning(once, removed, SHAPE), deepcopy(once)
    second.apply_(twice)
    assert_same_logits(masked, twice, images())

    file = io.BytesIO()
    torch.save({"surgeries": [to_plain(first), to_plain(second)], "state_dict": twice.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = build(name, seed=4)
    replay_(fresh, saved["surgeries"])
    fresh.load_state_dict(saved["state_dict"])
    assert torch.equal(fresh.eval()(images()), twice.eval()(images()))


@torch.no_grad()
def counted_macs(net: nn.Module) -> float:
    """By torch's own counter, which runs the net."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            net.eval()(images()[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ROWS)
def test_multiply_accumulates_are_exact(name: str) -> None:
    net, units, _, _, _, thinned = case(name)
    macs = Macs(net, SHAPE, units)
    kept = {layer: each.num - min(each.num - 1, each.num // 2) for layer, each in units.items()}
    whole, left = counted_macs(net), counted_macs(thinned)
    assert macs.total == pytest.approx(whole, rel=1e-12)
    assert macs(kept) == pytest.approx(left, rel=1e-12) and left < whole
    for layer, count in kept.items():
        before, gone = macs.total, macs.saved(layer, units[layer].num - count)
        macs.remove(layer, units[layer].num - count)
        assert macs.total == pytest.approx(before - gone, rel=1e-12)
    assert macs.total == pytest.approx(left, rel=1e-12)


@pytest.mark.parametrize(("width", "num_heads"), [(4, 2), (6, 3), (9, 3), (12, 6)])
def test_heads_are_found_whatever_their_number_and_width(width: int, num_heads: int) -> None:
    """They may be as many as they are wide, or as queries, keys and values."""
    blocks = [Heads(width, num_heads, together) for together in (True, False)]
    blocks += [nn.TransformerEncoderLayer(width, num_heads, 8, 0.0, batch_first=True)]
    for block in blocks:
        net = lively(on_tokens(block, width, width))
        units, reasons = look_at_units(net, SHAPE)
        assert reasons.keys() == {"head"} and num_heads in {each.num for each in units.values()}
        removed = choose(units, 0.5)
        masked, thinned = masked_net(net, removed, SHAPE), deepcopy(net)
        plan_thinning(net, removed, SHAPE).apply_(thinned)
        assert_same_logits(masked, thinned, images())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_nets_lose_half_of_all_units(seed: int) -> None:
    """Nothing stays but logits, single channels and the channels of depthwise groups: no rule is missing."""
    net = lively(random_net(seed))
    units, reasons = look_at_units(net, SHAPE)
    for layer, reason in reasons.items():
        assert re.search("its units are the logits|it is one channel|each group of", reason), (layer, reason)
    removed = choose(units, 0.5)
    masked, thinned = masked_net(net, removed, SHAPE), deepcopy(net)
    plan_thinning(net, removed, SHAPE).apply_(thinned)
    assert_same_logits(masked, thinned, images(), lively=False)


@pytest.mark.slow
def test_the_logits_of_most_random_nets_depend_on_the_image() -> None:
    assert sum(depends_on_images(lively(random_net(seed)), images()) for seed in range(200)) > 180


class Block(nn.Module):
    """A residual block. It may compute with the number of its hidden channels, which no trace can follow."""

    def __init__(self, culprit: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)
        self.culprit = culprit

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).relu()
        return x + self.b(y * y.shape[1] if self.culprit else y)


def deep(num_blocks: int, culprits: Iterable[int] = ()) -> nn.Module:
    blocks = (Block(n in culprits) for n in range(num_blocks))
    return nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_few_trials_find_the_groups_that_cannot_go(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = deep(40, {7, 8, 30})
    trials = 0
    real = units_module.try_out

    def counted(*args: Any) -> Any:
        nonlocal trials
        trials += 1
        return real(*args)

    monkeypatch.setattr(units_module, "try_out", counted)
    units, reasons = look_at_units(net, SHAPE)
    assert len(units) == 41 - 3 and {*reasons} == {"8.a", "9.a", "31.a", "43"} and trials <= 22


def test_modules_forget_what_they_computed_from_their_old_parameters() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.cache = nn.Parameter(torch.rand(8)), None

        def train(self, mode: bool = True) -> Any:
            self.cache = None
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return x + (2 * self.bias)[:, None, None]
            self.cache = 2 * self.bias if self.cache is None else self.cache
            return x + self.cache[:, None, None]

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Bias(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    net[0].train()
    with torch.no_grad():
        net(images())
    plan_thinning(net, {"0": [0, 5]}, SHAPE).apply_(net)
    assert net(images()).shape == (8, 5) and net[0].training and not net[1].training


@pytest.mark.slow
def test_a_net_of_a_thousand_layers_is_thinned_in_a_minute() -> None:
    net = deep(500)
    begin = time.process_time()
    units = units_of(net, SHAPE)
    plan_thinning(net, choose(units, 0.5), SHAPE).apply_(net)
    assert len(units) == 501 and time.process_time() - begin < 60
