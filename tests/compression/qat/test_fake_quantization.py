"""Rounding in training is the rounding of the file, and its gradient passes straight through."""

import numpy as np
import pytest
import torch
from helpers.subclasses import Mixed, fast_path
from torch import nn

from project.compression.plain_layers import name_layers, other_layers
from project.compression.qat.fake_quantization import FakeQuantization, fake_activation, fake_weight
from project.deployment.int8.observers import Scale, round_weight
from project.models import SmallInception

SHAPE = (1, 12, 12)


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_weights_round_as_in_the_file(num_bits: int, reduce_range: bool) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    integers, scales = round_weight(weight, num_bits, reduce_range=reduce_range)
    fake = fake_weight(weight, num_bits, reduce_range=reduce_range)
    torch.testing.assert_close(fake, integers * scales.view(-1, 1, 1, 1), rtol=1e-6, atol=1e-7)
    (grad,) = torch.autograd.grad(fake.sum(), weight)
    assert grad.eq(1).all()


def test_a_scale_per_channel_follows_batch_norm() -> None:
    """Folding multiplies channels: to round and fold is to fold and round."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    factors = torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    torch.testing.assert_close(fake_weight(weight, 8) * factors, fake_weight(weight * factors, 8))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 3.0), (-1.0, 2.0), (-1.0, 1.0), (-0.005, 2.0), (-2.0, 0.005), (-2.0, 0.0)]
)
def test_activations_round_as_in_the_file(low: float, high: float) -> None:
    x = torch.linspace(-2, 4, 1001, requires_grad=True)
    y = fake_activation(x, torch.tensor(low), torch.tensor(high))
    scale = Scale.of_range(low, high)
    expected = scale.fake(x.detach().double().numpy())
    assert np.abs(y.detach().numpy() - expected).max() <= 1.01 * scale.scale  # ties of .5 fall either way
    assert np.abs(y.detach().numpy() - expected).mean() <= 0.01 * scale.scale
    (grad,) = torch.autograd.grad(y.sum(), x)
    inside = (x >= low) & (x <= high)
    assert grad[inside].eq(1).all() and grad[(x < low - scale.scale) | (x > high + scale.scale)].eq(0).all()


def test_taken_out_the_net_is_what_it_was() -> None:
    torch.manual_seed(0)
    net = SmallInception(4, SHAPE, width=0.25).eval()
    images = torch.randn(5, *SHAPE)
    before, keys = net(images), list(net.state_dict())
    fake = FakeQuantization()
    fake.attach_(net)
    rough = net(images)
    assert list(net.state_dict()) == keys
    assert 0 < (rough - before).norm() < 0.1 * before.norm()
    fake.detach_()
    assert torch.equal(net(images), before)
    names = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert fake.ranges.keys() == names and all(low <= 0 <= high for low, high in fake.ranges.values())


def test_gradients_are_near_those_without_rounding() -> None:
    torch.manual_seed(0)
    net = SmallInception(4, SHAPE, width=0.25)
    images, labels = torch.randn(32, *SHAPE), torch.arange(32) % 4

    def gradients() -> torch.Tensor:
        net.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    plain = gradients()
    fake = FakeQuantization()
    fake.attach_(net)
    gradients()  # the first batch only sets the ranges
    rough = gradients()
    fake.detach_()
    assert nn.functional.cosine_similarity(plain, rough, dim=0) > 0.9


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="weight_bits is 1"):
        FakeQuantization(num_bits=1)


def test_plain_layers_round_also_in_torchs_fast_path_and_subclasses_do_not() -> None:
    torch.manual_seed(0)
    net = Mixed().eval()
    assert fast_path(net)
    fake = FakeQuantization(2)
    fake.attach_(net)
    with torch.no_grad():
        net(torch.randn(4, 3, 8, 8))
    fake.detach_()
    called = {"stem", "plain", "encoder.linear1", "encoder.linear2", "hidden", "head"}
    assert fake.ranges.keys() == called and fast_path(net)
    reasons = other_layers(net, (3, 8, 8))
    assert reasons.keys() == {"standard", "pad", "scaled", "reader.layer", "encoder.self_attn.out_proj"}
    assert "StandardConv" in reasons["standard"] and "not call" in reasons["reader.layer"]
    assert name_layers(reasons).endswith(" and 3 more")
