"""A net that is thinned in the middle of training goes on as the masked net does."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers.coupled_nets import ROWS, SHAPE
from helpers.nets import choose
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, Optimizer, RMSprop

from project.compression.thinning.carry import thin_optimizers_, thin_state
from project.compression.thinning.thin import Thin, sliced
from project.compression.thinning.units import masked_net, plan_thinning, units_of
from project.learning import Muon

NAMES = ["depthwise times 2", "dense", "tied weights", "pre-activation", "attention", "ConvNeXt"]
ELEMENTWISE: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(SGD, lr=0.1, weight_decay=0.01),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": partial(Adam, lr=0.01, amsgrad=True),
    "AdamW": partial(AdamW, lr=0.01, weight_decay=0.1),
    "NAdam": partial(NAdam, lr=0.01),
    "RMSprop": partial(RMSprop, lr=0.01, momentum=0.9, centered=True),
}
"""Optimizers that treat each weight on its own."""


def muon(parameters: list[nn.Parameter]) -> Muon:
    kinds = [[each for each in parameters if (each.dim() > 1) is many] for many in (True, False)]
    return Muon([{"params": kind} for kind in kinds if kind])


def step(net: nn.Module, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, *SHAPE, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(images), torch.arange(8) % 5).backward()
    optimizer.step()


def in_training(name: str, make: Callable[..., Optimizer]) -> tuple[nn.Module, nn.Module, Optimizer, Optimizer, Thin]:
    """A masked and a thinned net after three steps of training, with their optimizers, and the plan."""
    torch.manual_seed(0)
    net = ROWS[name].make().double().train()
    optimizer = make(list(net.parameters()))
    for seed in range(3):
        step(net, optimizer, seed)
    removed = choose(units_of(net, SHAPE), 0.5)
    masked, plan = masked_net(net, removed, SHAPE).train(), plan_thinning(net, removed, SHAPE)
    others = make(list(masked.net.parameters()))
    others.load_state_dict(deepcopy(optimizer.state_dict()))
    before = dict(net.named_parameters())
    plan.apply_(net)
    thin_optimizers_([optimizer], before, net, plan)
    return masked, net, others, optimizer, plan


def kept(plan: Thin, name: str, tensor: Tensor) -> Tensor:
    return sliced(tensor.detach(), plan.slices.get(name, []))


@pytest.mark.parametrize("optimizer", ELEMENTWISE)
@pytest.mark.parametrize("name", NAMES)
def test_the_next_steps_are_those_of_the_masked_net(name: str, optimizer: str) -> None:
    masked, thinned, of_masked, of_thinned, plan = in_training(name, ELEMENTWISE[optimizer])
    before = {key: parameter.detach().clone() for key, parameter in thinned.named_parameters()}
    step(masked, of_masked, 9)
    step(thinned, of_thinned, 9)
    whole = dict(masked.net.named_parameters())
    for key, parameter in thinned.named_parameters():
        torch.testing.assert_close(parameter.detach(), kept(plan, key, whole[key]), rtol=1e-9, atol=1e-9)
        assert not torch.equal(parameter, before[key]), f"{key} is not trained"
    assert len(of_thinned.state_dict()["state"]) == len(of_masked.state_dict()["state"])


@pytest.mark.parametrize("name", NAMES)
def test_muon_goes_on_with_its_momentum(name: str) -> None:
    """Its steps of matrices depend on the rows and columns that are gone; its steps of vectors do not."""
    masked, thinned, of_masked, of_thinned, plan = in_training(name, muon)
    pairs = {key: (masked.net.get_parameter(key), parameter) for key, parameter in thinned.named_parameters()}
    for key, (old, new) in pairs.items():
        assert of_thinned.state[new].keys() == of_masked.state[old].keys() != set()
        for what, value in of_thinned.state[new].items():
            assert torch.equal(value, kept(plan, key, of_masked.state[old][what])), (key, what)
    step(masked, of_masked, 9)
    step(thinned, of_thinned, 9)
    for key, (old, new) in pairs.items():
        if new.dim() == 1:
            torch.testing.assert_close(new.detach(), kept(plan, key, old), rtol=1e-9, atol=1e-9)


def test_a_state_of_another_shape_begins_anew() -> None:
    _, thinned, _, optimizer, plan = in_training("dense", Adafactor)
    parameters = dict(thinned.named_parameters())
    changed = {key for key in parameters if key in plan.slices}
    assert {key for key in parameters if optimizer.state.get(parameters[key])} == parameters.keys() - {
        key for key in changed if parameters[key].dim() > 1
    }
    step(thinned, optimizer, 9)
    assert all(optimizer.state[parameter] for parameter in parameters.values())


@pytest.mark.parametrize("name", NAMES)
def test_averages_and_saved_weights_lose_the_same_indices(name: str) -> None:
    torch.manual_seed(0)
    net = ROWS[name].make()
    averages = {f"net.{key}": value + 1 for key, value in net.state_dict().items()} | {"other": torch.ones(8)}
    plan = plan_thinning(net, choose(units_of(net, SHAPE), 0.5), SHAPE)
    plan.apply_(net)
    thinned = thin_state(averages, plan, "net.")
    assert torch.equal(thinned.pop("other"), torch.ones(8))
    for key, value in net.state_dict().items():
        assert torch.equal(thinned[f"net.{key}"], value + 1)
