"""Ranks of all layers at once: the least loss that a number of multiply-accumulates (MACs) pays for.

One option of each layer, costs and errors added up: a multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, ch.
11), solved by dynamic programming over the cost. Zhang et al. 2015 (arXiv:1505.06798, sec. 2.4) go down greedily, and
aim at the product of what the layers keep, which is the sum where little is lost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from project.compression.low_rank.factors import Kind

GRID = 20_000
"""Steps of the cost that are told apart."""


@dataclass(frozen=True)
class Option:
    """What a layer may become.

    Args:
        kind: of :mod:`project.compression.low_rank.factors`; ``dense`` is the layer as it is.
        ranks: none of ``dense``.
        macs: its multiply-accumulates for one image.
        error: what is lost with it, 0 or more.
    """

    kind: Kind | Literal["dense"]
    ranks: tuple[int, ...]
    macs: int
    error: float


def choose_within(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """One option of each layer, with the least sum of errors at no more than ``budget`` in all.

    Exact where the costs are multiples of some number, and the budget not more than ``GRID`` times that. Otherwise they
    count as the next multiple of ``budget / GRID``; what that leaves goes to the layers that gain most by it, so that
    in the end no single layer can have a better option that still fits.

    Raises:
        ValueError: when not even the cheapest options fit.
    """
    least = sum(min(option.macs for option in choices) for choices in options.values())
    if least > budget:
        raise ValueError(
            f"the layers may cost {budget:.0f} multiply-accumulates, but with the lowest ranks they cost {least}: "
            "raise macs_left, lower round_to, or include more layers."
        )
    options = {name: _worthwhile(choices) for name, choices in options.items()}
    divisor = math.gcd(*(option.macs for choices in options.values() for option in choices))
    unit = max(divisor, budget / GRID)
    size = math.floor(budget / unit + 1e-9)
    best = np.zeros(size + 1)  # least loss by cost
    picks = []
    for choices in options.values():
        new, pick = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.intp)
        for number, option in enumerate(choices):
            cost = math.ceil(option.macs / unit - 1e-9)
            if cost > size:
                continue
            loss = best[: size + 1 - cost] + option.error
            better = loss < new[cost:]
            new[cost:][better], pick[cost:][better] = loss[better], number
        best = new
        picks.append(pick)
    if np.isinf(best[size]):  # the cheapest fit, rounded up they do not
        return _fill(options, {name: choices[0] for name, choices in options.items()}, budget)
    chosen, left = {}, size
    for (name, choices), pick in zip(reversed(options.items()), reversed(picks), strict=True):
        chosen[name] = choices[pick[left]]
        left -= math.ceil(chosen[name].macs / unit - 1e-9)
    return _fill(options, {name: chosen[name] for name in options}, budget)


def _worthwhile(choices: Sequence[Option]) -> list[Option]:
    """By rising cost, those that lose less than all cheaper ones."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda option: (option.macs, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _fill(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], budget: float) -> dict[str, Option]:
    """Spend what is left on the best single change, again and again."""
    while True:
        left = budget - sum(option.macs for option in chosen.values())
        changes = [
            (chosen[name].error - option.error, name, option)
            for name, choices in options.items()
            for option in choices
            if option.macs - chosen[name].macs <= left and option.error < chosen[name].error
        ]
        if not changes:
            return chosen
        _, name, option = max(changes, key=lambda change: (change[0], -change[2].macs))
        chosen[name] = option
