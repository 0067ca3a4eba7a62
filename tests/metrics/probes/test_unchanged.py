"""A measurement leaves no trace: neither in the net nor in the random states, also if it fails."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from project.metrics.probes import loss_landscape, sharpness, top_eigenvalue, unchanged


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 3)
    )
    net[0].register_buffer("never_saved", torch.tensor([-0.0, torch.nan, 1e-45]), persistent=False)
    net[0].register_buffer("absent", None)
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net(torch.randn(5, 1, 8, 8)).square().sum().backward()
    assert net[0].weight.grad is None and net[5].weight.grad is not None
    return net


def bits(net):
    """Everything that a probe may not change, as plain values and raw bytes."""
    raw = {name: value.detach().numpy().tobytes() for name, value in [*net.named_parameters(), *net.named_buffers()]}
    places = {name: value.data_ptr() for name, value in [*net.named_parameters(), *net.named_buffers()]}
    grads = {
        n: (None if p.grad is None else (p.grad.data_ptr(), p.grad.numpy().tobytes()))
        for n, p in net.named_parameters()
    }
    flags = {name: value.requires_grad for name, value in net.named_parameters()}
    modes = {name: module.training for name, module in net.named_modules()}
    states = random.getstate(), torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()
    return raw, places, grads, flags, modes, states


def disturb(net):
    """All that a measurement could do to a net."""
    net.train()
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    net(torch.randn(5, 1, 8, 8)).sum().backward()
    net[0].never_saved.fill_(3)
    net[0].absent = torch.ones(2)
    net[5].weight.grad = None
    net[0].bias = nn.Parameter(torch.ones(4))
    with torch.no_grad():
        net[5].weight.add_(1)
    random.random(), np.random.rand(), torch.rand(1)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back_to_the_bit(fails):
    net = make_net()
    before = bits(net)
    try:
        with unchanged(net):
            disturb(net)
            assert bits(net) != before
            if fails:
                raise OSError("the disk is gone")
    except OSError:
        assert fails
    assert bits(net) == before
    assert net[0].absent is None


def test_a_graph_from_before_can_still_be_used():
    def gradient(with_probe):
        net = make_net().train()
        loss = net(torch.ones(5, 1, 8, 8)).square().sum()
        if with_probe:
            with unchanged(net):
                trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
                loss_landscape(lambda: net(torch.ones(5, 1, 8, 8)).square().sum(), trained, [0.1])
        loss.backward()
        return net[5].weight.grad

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize(
    "probe",
    [
        lambda f, p: loss_landscape(f, p, [0.1, 0.5]),
        lambda f, p: sharpness(f, p),
        lambda f, p: sharpness(f, p, subspace=5),
        lambda f, p: top_eigenvalue(f, p, 3),
    ],
    ids=["landscape", "sharpness", "subspace", "eigenvalue"],
)
def test_a_probe_inside_leaves_nothing(probe):
    net = make_net()
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    before = bits(net)
    with unchanged(net):
        net.train()
        for parameter in net.parameters():
            parameter.requires_grad_(True)

        def objective():
            torch.manual_seed(0)
            return nn.functional.cross_entropy(net(images), labels)

        probe(objective, list(net.parameters()))
    assert bits(net) == before
