"""Bits by layer: what is estimated, and that a budget goes where it helps."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from project.compression import Codebook, Sharer
from project.compression.weight_sharing.bit_budget import BITS, Option, choose_bits, estimated_bytes, measure_options
from project.models import SmallInception


def test_bytes_are_entropies_and_codebook():
    torch.manual_seed(0)
    index = torch.randint(1, 9, (30, 40)) * (torch.rand(30, 40) < 0.3)
    numbers = index[index > 0].numpy()
    symbols = entropy(np.bincount(numbers), base=2) * len(numbers)
    positions = entropy([len(numbers), 1200 - len(numbers)], base=2) * 1200
    assert estimated_bytes(torch.zeros(9), index) == pytest.approx((symbols + positions) / 8 + 2 * 8)
    dense = torch.arange(1, 17).repeat(100)
    assert estimated_bytes(torch.zeros(17), dense) == pytest.approx(1600 * 4 / 8 + 2 * 16)


def random_options(seed: int) -> dict[str, list[Option]]:
    """Losses that fall by about a quarter with each bit, as squared errors do, and chance."""
    random = np.random.default_rng(seed)
    return {
        f"layer{number}": [
            Option(bits, float(bits * size), float(scale * 4.0**-bits * random.uniform(0.5, 2))) for bits in range(1, 6)
        ]
        for number, (size, scale) in enumerate(zip(random.integers(1, 50, 4), random.uniform(1, 100, 4), strict=True))
    }


def of(options: dict[str, list[Option]], bits: dict[str, int]) -> list[Option]:
    return [next(option for option in choices if option.bits == bits[layer]) for layer, choices in options.items()]


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_as_few_bytes_loses_less(seed):
    """Greedy steps along hulls end at the best choice for what they spend, as every Lagrange multiplier's does; a
    budget that falls between two such points is not spent to the end.
    """
    options = random_options(seed)
    every = [list(choice) for choice in product(*options.values())]
    for budget in np.linspace(sum(choices[0].num_bytes for choices in options.values()), 400, 7):
        chosen = of(options, choose_bits(options, budget))
        spent, loss = (sum(getattr(option, key) for option in chosen) for key in ("num_bytes", "loss"))
        assert spent <= budget
        steps = [max(o.num_bytes for o in choices) for choices in options.values()]
        smaller = [c for c in every if sum(o.num_bytes for o in c) <= spent - max(steps)]
        assert all(sum(o.loss for o in choice) >= loss for choice in smaller)


def test_a_large_budget_buys_all_and_a_small_one_is_refused():
    options = random_options(0)
    best = {layer: min(choices, key=lambda option: option.loss).bits for layer, choices in options.items()}
    assert choose_bits(options, 1e9) == best
    with pytest.raises(ValueError, match="budget_bytes is 1, but with one bit"):
        choose_bits(options, 1)


def test_measured_options_of_a_net():
    torch.manual_seed(0)
    net = SmallInception(10, (1, 8, 8), width=0.25)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    names = list(Sharer(include=["stem", "^fc$"]).layers(net))
    options = measure_options(net, names, torch.randn(64, 1, 8, 8), "linear")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    for choices in options.values():
        assert [choice.bits for choice in choices] == list(BITS)
        assert choices[0].loss > choices[-1].loss >= 0
    budget = sum(choices[3].num_bytes for choices in options.values())
    chosen = choose_bits(options, budget)
    codebook = Codebook.of(net, chosen, "linear")
    assert sum(estimated_bytes(codebook.centers[name], codebook.index[name]) for name in names) <= budget
    loss = sum(option.loss for option in of(options, chosen))
    assert loss < sum(choices[3].loss for choices in options.values()) and len(set(chosen.values())) > 1
