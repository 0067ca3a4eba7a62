"""Norms as scale and shift, rounded to a grid: the same net, up to rounding."""

import copy

import pytest
import torch
from helpers.subclasses import FrozenNorm, VarianceNorm
from torch import nn
from torch.nn.utils import parametrize

from project.compression.norm_folding import fixed_point, fold_norms_, reestimate_statistics_, round_vectors_
from project.models import SmallInception


def used_net() -> nn.Module:
    """Statistics and scales are those of no fresh net."""
    torch.manual_seed(0)
    net = SmallInception(10, (1, 8, 8), width=0.25, fc_dropout=0.5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.1, 3)
    return net.eval()


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_folded_net_computes_the_same():
    net = used_net()
    folded = copy.deepcopy(net)
    fold_norms_(folded)
    images = torch.randn(8, 1, 8, 8)
    assert torch.allclose(folded(images), net(images), rtol=1e-4, atol=1e-4)
    for norm in norms(folded):
        assert not norm.running_mean.any() and torch.equal(norm.running_var, torch.full_like(norm.bias, 1 - norm.eps))
    assert folded.state_dict().keys() == net.state_dict().keys()


def test_a_folded_norm_is_scale_and_shift():
    (norm, *_) = norms(used_net())
    with torch.no_grad():
        fold_norms_(norm)
        x = torch.randn(4, norm.num_features, 5, 5)
        expected = x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        assert torch.allclose(norm(x), expected, rtol=1e-6, atol=1e-6)


def test_twice_is_once():
    net = used_net()
    fold_norms_(net)
    round_vectors_(net, 8)
    before = copy.deepcopy(net.state_dict())
    fold_norms_(net)
    round_vectors_(net, 8)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_statistics_are_those_of_the_images():
    net = used_net()
    norm = norms(net)[0]
    seen = []
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    reestimate_statistics_(net, torch.randn(100, 1, 8, 8), batch_size=50)
    hook.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    assert len(seen) == 2 and torch.allclose(norm.running_mean, means.mean(0), atol=1e-5)
    variances = torch.stack([x.var((0, 2, 3)) for x in seen])
    assert torch.allclose(norm.running_var, variances.mean(0), rtol=1e-4)
    assert norm.momentum == 0.1 and not any(module.training for module in net.modules())


@pytest.mark.parametrize("num_bits", [2, 4, 8, 16])
@pytest.mark.parametrize("scale", [1e-6, 0.3, 127.4, 128.0, 5e4])
def test_the_grid(num_bits, scale):
    torch.manual_seed(1)
    x = torch.cat([torch.randn(100), torch.tensor([1.0, -1.0, 0.0])])
    x = x / x.abs().max() * scale
    rounded = fixed_point(x, num_bits)
    step = float((rounded[rounded != 0].abs()).min())
    exponents = [e for e in range(-60, 60) if torch.equal(rounded / 2.0**e, (rounded / 2.0**e).round())]
    integers = rounded / 2.0 ** max(exponents)
    assert step > 0 and integers.abs().max() <= 2 ** (num_bits - 1) - 1
    assert (rounded - x).abs().max() <= 2.0 ** (2 - num_bits) * scale
    assert torch.equal(fixed_point(rounded, num_bits), rounded)


def test_only_vectors_are_rounded():
    net = used_net()
    before = copy.deepcopy(net.state_dict())
    round_vectors_(net, 4)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.dim() > 1 or not parameter.any()), name
    assert all(len(norm.weight.unique()) <= 15 for norm in norms(net))


def test_zeros_stay():
    assert torch.equal(fixed_point(torch.zeros(3), 8), torch.zeros(3))


@pytest.mark.parametrize(("norm", "folds"), [(FrozenNorm, True), (VarianceNorm, False)])
def test_a_subclass_keeps_its_outputs_and_its_own_statistics(norm, folds):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8)).eval()
    nn.init.uniform_(net[1].running_var, 0.1, 3)
    nn.init.normal_(net[1].running_mean)
    images = torch.randn(4, 3, 8, 8)
    before, state = net(images), copy.deepcopy(net.state_dict())
    reestimate_statistics_(net, images)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    fold_norms_(net)
    assert torch.allclose(net(images), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(net[1].running_var, state["1.running_var"]) is not folds


def test_a_subclass_that_folds_is_rounded_and_a_computed_weight_stays():
    net = nn.Sequential(FrozenNorm(4), nn.BatchNorm2d(4)).eval()
    for norm in net:
        nn.init.uniform_(norm.running_var, 0.1, 3)
        nn.init.normal_(norm.running_mean)
    parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    images = torch.randn(2, 4, 3, 3)
    before = net(images)
    fold_norms_(net, 8)
    assert torch.equal(net[0].running_mean, torch.zeros(4)) and net[1].running_mean.any()
    assert (net(images) - before).abs().max() <= 0.02 * before.abs().max()


def convolutions(num_constant: int = 0, variance: float = 0.0) -> tuple[nn.Sequential, torch.Tensor]:
    """A small net in eval mode with the statistics of its images; some channels of its first norm are constant."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )
    with torch.no_grad():
        net[0].weight[:num_constant] *= variance**0.5
        net[0].bias[:num_constant] = 0.5  # their mean, which the large scale multiplies in the shift
        net[1].bias.uniform_(-1, 1)
    images = torch.randn(64, 3, 8, 8)
    reestimate_statistics_(net, images)
    return net, images


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_constant", "variance", "limit"),
    [(0, 0, 0.02), (1, 0, 0.02), (8, 0, 0.02), (16, 0, 0.02), (1, 1e-9, 0.02), (8, 1e-9, 0.03), (8, 1e-7, 0.1)],
)
def test_constant_channels_do_not_take_the_bits_of_the_others(num_constant, variance, limit):
    """Scales of 316 beside scales of about 2: rounded together, the error would be larger than the largest output."""
    net, images = convolutions(num_constant, variance)
    exact = net(images)
    fold_norms_(net, 8)
    round_vectors_(net, 8)
    assert (net(images) - exact).abs().max() <= limit * exact.abs().max()


def test_scales_that_fit_are_rounded_once():
    net = used_net()
    fold_norms_(net, 8)
    scales = [norm.weight.clone() for norm in norms(net)]
    round_vectors_(net, 8)
    assert all(torch.equal(norm.weight, scale) for norm, scale in zip(norms(net), scales, strict=True))
