"""A thinned net computes what the masked one does. What cannot be removed exactly stays, and is named."""

import math
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.nets import (
    NETS,
    OTHERS,
    SMALL,
    assert_same_logits,
    build,
    choose,
    enliven_,
    images_for,
    masked_and_thinned,
    reference_and_thinned,
    units_by_layer,
)
from torch import Tensor, nn

from project import models
from project.compression.thinning.masked import MaskedNet
from project.compression.thinning.thin import Thin
from project.compression.thinning.units import look_at_units, masked_net, plan_thinning, units_of, why_not
from project.metrics.complexity import count_macs, count_parameters
from project.models import SmallInception
from project.models.inception_blocks import Branches, NaiveInception
from project.models.layers import GlobalAvgPool
from project.models.surgery import replay_, to_plain

LARGE = {"InceptionV3-75", "BNGoogLeNet-48"}


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [
        pytest.param(name, sparsity, marks=[pytest.mark.slow] if name in LARGE or sparsity != 0.5 else [])
        for name in NETS
        for sparsity in (0.25, 0.5, 0.9)
    ],
)
def test_thinned_equals_masked(name: str, sparsity: float) -> None:
    masked, thinned, _ = reference_and_thinned(name, sparsity)
    assert_same_logits(masked, thinned, images_for(name))
    net, shape = masked.net, NETS[name][1]
    assert count_parameters(thinned) < (1 - sparsity) * count_parameters(net)
    # The first layer's images keep their share.
    assert count_macs(thinned, shape) < (1 - 0.9 * sparsity) * count_macs(net, shape)
    assert thinned.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", OTHERS)
def test_thinned_equals_masked_with_other_layers(name: str) -> None:
    masked, thinned, _ = reference_and_thinned(name, 0.5)
    assert_same_logits(masked, thinned, images_for(name))
    assert count_parameters(thinned) < 0.6 * count_parameters(masked)


def test_zeros_that_stay_make_it_exact_in_training_too() -> None:
    masked, thinned, _ = reference_and_thinned("SmallInception-28", 0.5)
    images = images_for("SmallInception-28")
    logits, expected = thinned.train()(images), masked.train()(images)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def lively_pair(
    net: nn.Module, removed: dict[str, list[int]], shape: tuple[int, int, int], images: Tensor
) -> tuple[MaskedNet, nn.Module]:
    """The masked net with lively weights, and the thinned net."""
    masked = masked_net(net, removed, shape)
    enliven_(masked.net, images)
    thinned = deepcopy(masked.net)
    plan_thinning(net, removed, shape).apply_(thinned)
    return masked, thinned


def test_one_unit_of_one_layer() -> None:
    name, shape = "SmallInception-28", (1, 28, 28)
    net, units = build(name), units_by_layer(name)
    first, second, *_, last = units
    for layer in (first, last):
        masked, thinned = lively_pair(net, {layer: [3], second: []}, shape, images_for(name))
        assert_same_logits(masked, thinned, images_for(name))
        assert thinned.get_submodule(layer).out_channels == units[layer].num - 1
        assert thinned.get_submodule(second).out_channels == units[second].num


@pytest.mark.parametrize("name", SMALL)
def test_thinned_twice_saved_and_loaded_gives_equal_logits(name: str, tmp_path: Path) -> None:
    _, thinned, first = masked_and_thinned(name, 0.25)
    shape = NETS[name][1]
    units = units_of(thinned, shape)
    second = plan_thinning(thinned, choose(units, 0.5), shape)
    second.apply_(thinned)
    checkpoint = {"surgeries": [to_plain(first), to_plain(second)], "state_dict": thinned.state_dict()}
    torch.save(checkpoint, tmp_path / "thinned.ckpt")

    loaded = torch.load(tmp_path / "thinned.ckpt", weights_only=True)
    fresh = build(name, seed=4)
    replay_(fresh, loaded["surgeries"])
    fresh.load_state_dict(loaded["state_dict"])
    images = images_for(name)
    assert torch.equal(fresh.eval()(images), thinned.eval()(images))
    assert repr(fresh) == repr(thinned)


@pytest.mark.parametrize("name", SMALL)
def test_thinned_net_trains(name: str) -> None:
    _, thinned, _ = masked_and_thinned(name, 0.5)
    thinned.train()
    optimizer = torch.optim.SGD(thinned.parameters(), lr=0.01, momentum=0.9)
    before = [parameter.detach().clone() for parameter in thinned.parameters()]
    nn.functional.cross_entropy(thinned(images_for(name)), torch.arange(8) % 5).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in thinned.parameters())
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(thinned.parameters(), before, strict=True))


def test_layers_state_their_new_sizes() -> None:
    masked, thinned, plan = masked_and_thinned("SmallInception-64x48", 0.5)
    widths = {}
    for name, module in thinned.named_modules():
        if hasattr(module, "out_channels"):
            module.register_forward_hook(
                lambda module, args, output, name=name: widths.update({name: (module.out_channels, output.shape[1])})
            )
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.bias) == len(module.running_mean)
    thinned(images_for("SmallInception-64x48"))
    assert all(stated == true for stated, true in widths.values())
    assert plan.out_channels.keys() == {name for name, m in thinned.named_modules() if isinstance(m, Branches)} != set()
    assert thinned.fc.in_features == thinned.fc.weight.shape[1] == masked.fc.in_features // 2


def test_memory_format_type_frozen_layers_and_modes_stay() -> None:
    net = build("SmallInception-28").double().to(memory_format=torch.channels_last)
    net.stem.requires_grad_(False)
    net.blocks.eval()
    plan = plan_thinning(net, choose(units_by_layer("SmallInception-28"), 0.5), (1, 28, 28))
    assert plan == plan_thinning(
        build("SmallInception-28"), choose(units_by_layer("SmallInception-28"), 0.5), (1, 28, 28)
    )
    before = {name: (p.dtype, p.requires_grad) for name, p in net.named_parameters()}
    modes = {name: module.training for name, module in net.named_modules()}
    plan.apply_(net)
    assert before == {name: (p.dtype, p.requires_grad) for name, p in net.named_parameters()}
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert all(parameter.is_leaf and isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            many = module.kernel_size != (1, 1) and module.in_channels > 1
            assert module.weight.is_contiguous() != many


def test_units_name_their_parameters() -> None:
    units = units_by_layer("SmallInception-28")
    stem = units["stem.0.conv"]
    assert stem.parameters == ("stem.0.conv.weight", "stem.0.norm.weight", "stem.0.norm.bias")
    assert stem.buffers == {"stem.0.norm.running_mean", "stem.0.norm.running_var"}
    assert stem.outputs([3, 5]) == [3, 5]
    assert (stem.num, stem.coupled, stem.readers, stem.values) == (16, (), {"stem.1.conv": 1}, math.inf)
    assert all(indices.tolist() == [[unit] for unit in range(16)] for indices in stem.slices.values())
    layers = {n for n, m in build("SmallInception-28").named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert units.keys() == layers - {"fc"}
    lenet = units_by_layer("LeNet5-28x19")
    assert lenet["fc1"].num == 500 and lenet["fc1"].parameters == ("fc1.weight", "fc1.bias")
    assert lenet["fc1"].readers == {"fc2": 1}
    assert lenet["conv2.conv"].readers == {"fc1": 4 * 1}, "each channel is flattened"
    assert lenet["conv2.conv"].slices["fc1.weight", 1][2].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("name", [*NETS, *OTHERS])
def test_every_layer_has_units_or_a_reason(name: str) -> None:
    net, units = build(name), units_by_layer(name)
    layers = {n for n, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    (head,) = [layer for layer in layers if getattr(net.get_submodule(layer), "out_features", 0) == 5]
    assert layers - units.keys() == {head}
    reasons = why_not(net, (NETS | OTHERS)[name][1])
    assert reasons.keys() == {head} and "logits" in reasons[head]


class Own(nn.Module):
    """Two convolutions, something between them, and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.between = between
        self.unused = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.between(self.conv1(images))
        return self.fc(torch.relu(self.conv2(x)).mean(dim=(-1, -2)))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: x.softmax(dim=1), "a softmax in the net is taken over its units"),
        (lambda x: x.roll(1, dims=1), "the net changes its order"),
        (lambda x: x.flip(1), "the net changes its order"),
        (lambda x: x[:, torch.arange(8)], "the net takes it by numbers"),
        (lambda x: x.logcumsumexp(1), "it passes through logcumsumexp in the net, which has no rule"),
        (lambda x: x / x.shape[1], r"its logits change by \d.\de-0\d"),
        (lambda x: x.view(-1, 8, 10, 10), "it no longer runs"),
    ],
)
def test_what_cannot_be_removed_is_named_and_the_rest_goes(between: Callable[[Tensor], Tensor], reason: str) -> None:
    torch.manual_seed(0)
    net, shape = Own(between), (3, 12, 12)
    units, reasons = look_at_units(net, shape)
    assert units.keys() == {"conv2"} and reasons.keys() == {"conv1", "fc", "unused"}
    assert re.search(reason, reasons["conv1"]) and reasons["unused"] == "the net does not call it in evaluation"
    with pytest.raises(
        ValueError, match=f"(units of conv1 cannot be removed: |Own is not what it was).*{reason}.*[Ll]eave"
    ):
        plan_thinning(net, {"conv1": [0]}, shape)
    plan_thinning(net, {"conv2": [0, 3]}, shape).apply_(net)
    assert net.fc.in_features == 6 and net(torch.randn(2, *shape)).shape == (2, 5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        return self.fc((x + torch.relu(self.conv(x))).mean(dim=(2, 3)))


def test_layers_that_are_added_up_lose_the_same_units() -> None:
    torch.manual_seed(0)
    net, shape = Residual(), (3, 9, 9)
    (units,) = units_of(net, shape).values()
    parameters = {"stem.weight", "stem.bias", "norm.weight", "norm.bias", "conv.weight", "conv.bias"}
    assert units.layers == ("stem", "conv") and units.coupled == ("conv",)
    assert {*units.parameters} == parameters and units.buffers == {"norm.running_mean", "norm.running_var"}
    images = torch.randn(8, *shape)
    for removed in ({"stem": [1, 2]}, {"conv": [2, 1]}, {"stem": [1], "conv": [2]}):
        masked, thinned = lively_pair(net, removed, shape, images)
        assert_same_logits(masked, thinned, images)
        assert thinned.conv.weight.shape == (6, 6, 3, 3) and thinned.fc.in_features == 6


def test_blocks_whose_pooling_passes_everything_on() -> None:
    torch.manual_seed(0)
    blocks = [NaiveInception(8, 8, 16, 8), NaiveInception(40, 8, 8, 8)]
    layers = [nn.Conv2d(3, 8, 3, bias=False), *blocks, nn.AvgPool2d(4)]
    net, shape, images = (
        nn.Sequential(*layers, GlobalAvgPool(), nn.Linear(64, 5)),
        (3, 10, 10),
        torch.randn(8, 3, 10, 10),
    )
    removed = choose(units_of(net, shape), 0.5)
    assert len(removed) == 7
    masked, thinned = lively_pair(net, removed, shape, images)
    assert_same_logits(masked, thinned, images)
    assert (thinned[1].out_channels, thinned[2].out_channels) == (20, 32)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"conv9": [0]}, "'conv9' is no layer of the net whose units can be removed: choose among conv1.conv, "),
        ({"conv1.norm": [0]}, "'conv1.norm' is no layer"),
        ({"conv2.conv": range(50)}, r"all 50 units of conv2.conv would go.*keep at least one"),
        ({"conv1.conv": [1], "conv2.conv": [0, 50]}, "conv2.conv has no unit 50: its 50 units count from 0 to 49"),
        ({"fc1": torch.tensor([-1])}, "fc1 has no unit -1"),
        ({"fc2": [0]}, r"units of fc2 cannot be removed: it gives the net's output.*Leave this layer out"),
    ],
)
def test_plans_that_can_not_be_are_refused(removed: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_thinning(build("LeNet5-28x19"), removed, (3, 28, 19))


def test_nets_that_the_plan_does_not_fit_are_refused_untouched() -> None:
    plan = plan_thinning(build("LeNet5-28x19"), {"conv1.conv": [0], "fc1": [5]}, (3, 28, 19))
    for other, message in [
        (models.LeNet300100(5, (3, 28, 19)), "LeNet300100 has no layer conv1.conv"),
        (SmallInception(5, (1, 28, 28)), "SmallInception has no layer"),
    ]:
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            plan.apply_(other)
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    net = build("LeNet5-28x19")
    plan.apply_(net)
    with pytest.raises(
        ValueError, match=r"conv1.conv.weight has 19 indices in dimension 0, but 19 is to be kept.*thin it once"
    ):
        plan.apply_(net)


def test_nothing_to_remove_is_no_change() -> None:
    net = build("LeNet5-28x19")
    plan = plan_thinning(net, {"conv1.conv": []}, (3, 28, 19))
    parameters = list(net.parameters())
    plan.apply_(net)
    assert plan == Thin({}, {}) and all(a is b for a, b in zip(net.parameters(), parameters, strict=True))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_tracing_leaves_the_net_as_it_was(
    context: Callable[[], torch.no_grad], capsys: pytest.CaptureFixture[str]
) -> None:
    name, shape = "dropout", (1, 28, 28)
    expected = units_by_layer(name).values()
    net = build(name).to(memory_format=torch.channels_last)
    net.stem[0].requires_grad_(False)
    net.pool.eval()
    net(images_for(name)).sum().backward()
    tensors = {key: (value, value.clone(), value.stride()) for key, value in net.state_dict(keep_vars=True).items()}
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()]
    modules = {key: (module.training, getattr(module, "inplace", None)) for key, module in net.named_modules()}
    state = torch.get_rng_state()
    with context():
        units = units_of(net, shape)
        plan_thinning(net, choose(units, 0.5), shape)
    for found, plain in zip(units.values(), expected, strict=True):
        assert found.layers == plain.layers, "neither mode nor frozen layers nor memory format matter"
        assert all(torch.equal(*pair) for pair in zip(found.slices.values(), plain.slices.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert modules == {k: (module.training, getattr(module, "inplace", None)) for k, module in net.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    for key, value in net.state_dict(keep_vars=True).items():
        tensor, copied, stride = tensors[key]
        assert value is tensor and torch.equal(value, copied) and value.stride() == stride
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        assert parameter.grad is grad or torch.equal(parameter.grad, grad)
    assert not net.stem[0].conv.weight.requires_grad and net.fc.weight.grad is not None
    assert capsys.readouterr() == ("", "")


def test_a_net_that_does_not_run_raises_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="channel"):
        why_not(Own(torch.relu), (1, 12, 12))
