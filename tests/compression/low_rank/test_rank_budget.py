"""The knapsack of ranks, against trying everything."""

import random
from itertools import product

import pytest

from project.compression.low_rank import rank_budget
from project.compression.low_rank.rank_budget import Option, choose_within


def layers(seed: int, num_layers: int = 4, unit: int = 1) -> dict[str, list[Option]]:
    draw = random.Random(seed)
    options = {}
    for number in range(num_layers):
        step, steps = draw.randrange(3, 30) * unit, draw.randrange(2, 6)
        errors = sorted((draw.random() for _ in range(steps)), reverse=True)
        dense = Option("dense", (), step * (steps + 1), 0.0)
        options[f"layer{number}"] = [dense, *(Option("svd", (i + 1,), step * (i + 1), e) for i, e in enumerate(errors))]
    return options


def cost(chosen: dict[str, Option]) -> int:
    return sum(option.macs for option in chosen.values())


def loss(chosen: dict[str, Option]) -> float:
    return sum(option.error for option in chosen.values())


@pytest.mark.parametrize("seed", range(25))
def test_nothing_within_the_budget_is_better(seed):
    options = layers(seed)
    dense = sum(choices[0].macs for choices in options.values())
    least = sum(min(option.macs for option in choices) for choices in options.values())
    for budget in (least, least + 0.3 * (dense - least), least + 0.8 * (dense - least), dense):
        chosen = choose_within(options, budget)
        assert list(chosen) == list(options) and cost(chosen) <= budget
        everything = (dict(zip(options, choice, strict=True)) for choice in product(*options.values()))
        assert loss(chosen) == pytest.approx(min(loss(each) for each in everything if cost(each) <= budget))
    assert all(option.kind == "dense" for option in chosen.values())


@pytest.mark.parametrize("seed", range(10))
def test_on_a_coarse_grid_the_budget_still_holds_and_no_single_step_is_left(seed, monkeypatch):
    options = layers(seed, num_layers=6, unit=1009)
    best = choose_within(options, budget := 0.6 * sum(choices[0].macs for choices in options.values()))
    monkeypatch.setattr(rank_budget, "GRID", 40)
    chosen = choose_within(options, budget)
    assert cost(chosen) <= budget and loss(best) - 1e-12 <= loss(chosen) < 1.5 * loss(best) + 0.3
    for name, choices in options.items():
        better = [option for option in choices if option.error < chosen[name].error]
        assert all(cost({**chosen, name: option}) > budget for option in better)


def test_a_budget_that_only_the_lowest_ranks_meet_is_met_and_a_lower_one_refused(monkeypatch):
    monkeypatch.setattr(rank_budget, "GRID", 7)
    options = layers(3, unit=1009)
    lowest = {name: min(choices, key=lambda option: option.macs) for name, choices in options.items()}
    assert choose_within(options, cost(lowest)) == lowest
    with pytest.raises(ValueError, match=r"may cost \d+ multiply-accumulates.*raise macs_left"):
        choose_within(options, cost(lowest) - 1)
