import pytest
import torch
from torch import nn

from project.losses import MaxNorm, Penalties
from project.models import SmallInception


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SmallInception(10, (1, 8, 8), width=0.25)


def gradients(net, penalties):
    net.zero_grad()
    penalties(net).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def weight_names(net, *types):
    return {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, types)}


def test_gradient_is_the_formula_for_each_kind_and_nothing_else(net):
    found = gradients(net, Penalties(l1_conv=0.1, l1_fc=0.2, l2_conv=0.3, l2_fc=0.4))
    conv, fc = weight_names(net, nn.Conv2d), weight_names(net, nn.Linear)
    for name, parameter in net.named_parameters():
        if name in conv:
            torch.testing.assert_close(found[name], 0.1 * parameter.sign() + 0.3 * parameter)
        elif name in fc:
            torch.testing.assert_close(found[name], 0.2 * parameter.sign() + 0.4 * parameter)
        else:
            assert found[name] is None, f"{name} is a norm or a bias"


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ({"l1_conv": 2.0}, lambda conv, fc: 2 * sum(w.abs().sum() for w in conv)),
        ({"l1_fc": 2.0}, lambda conv, fc: 2 * sum(w.abs().sum() for w in fc)),
        ({"l2_conv": 2.0}, lambda conv, fc: sum(w.square().sum() for w in conv)),
        ({"l2_fc": 2.0}, lambda conv, fc: sum(w.square().sum() for w in fc)),
    ],
)
def test_each_strength_acts_on_its_kind_alone(strengths, expected, net):
    conv, fc = ([m.weight for m in net.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear))
    assert conv and fc
    found = Penalties(**strengths)(net).double()
    torch.testing.assert_close(found, expected(conv, fc).double(), rtol=1e-4, atol=0)


def test_off_means_no_term(net):
    assert Penalties()(net) is None
    assert Penalties(l2_conv=1.0)(nn.Linear(2, 2)) is None


def test_gradient_is_finite_where_all_weights_are_zero():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert torch.equal(gradients(layer, Penalties(l1_fc=1, l2_fc=1))["weight"], torch.zeros(2, 3))


def test_shared_weight_counts_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    torch.testing.assert_close(Penalties(l2_fc=2)(nn.Sequential(first, second)), first.weight.square().sum())


def test_l2_under_sgd_is_weight_decay():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    b.load_state_dict(a.state_dict())
    x = torch.ones(2, 4)
    for layer, penalties, decay in ((a, Penalties(l2_fc=0.1), 0.0), (b, Penalties(), 0.1)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
        for _ in range(3):
            optimizer.zero_grad()
            loss, penalty = layer(x).square().sum(), penalties(layer)
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
    torch.testing.assert_close(a.weight, b.weight)


@pytest.mark.parametrize("name", ["l1_conv", "l1_fc", "l2_conv", "l2_fc"])
def test_negative_strength_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is -0.1"):
        Penalties(**{name: -0.1})


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_max_norm_projects_each_unit_and_leaves_short_ones(memory_format):
    torch.manual_seed(0)
    conv, fc = nn.Conv2d(3, 8, 3).to(memory_format=memory_format), nn.Linear(5, 6)
    with torch.no_grad():
        conv.weight.mul_(torch.linspace(0.1, 10, 8).view(-1, 1, 1, 1))
        fc.weight.mul_(10)
    before = [layer.weight.detach().clone() for layer in (conv, fc)]
    MaxNorm(conv=2.0)(nn.Sequential(conv, fc))
    assert torch.equal(fc.weight, before[1])
    lengths = before[0].flatten(1).norm(dim=1)
    assert (lengths < 2).any() and (lengths > 2).any()
    scale = (2 / lengths).clamp(max=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(conv.weight.detach(), before[0] * scale)
    assert torch.equal(conv.weight[lengths < 2], before[0][lengths < 2])
    MaxNorm(fc=1.0)(nn.Sequential(conv, fc))
    assert fc.weight.norm(dim=1).max() <= 1 + 1e-6
    assert conv.weight.requires_grad and conv.weight.grad_fn is None


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_max_norm_must_be_positive(norm):
    with pytest.raises(ValueError, match="max-norm fc is"):
        MaxNorm(fc=norm)
