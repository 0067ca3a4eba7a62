"""Ranks of all layers together: the least loss for a given number of multiply-accumulates (MACs).

Each layer has several options, and one of them is chosen. Costs and errors add up over the layers. This is a
multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, ch. 11), solved by dynamic programming over the cost.

Zhang et al. 2015 (arXiv:1505.06798, sec. 2.4) lower the ranks greedily instead, and maximise the product of the shares
that the layers keep. If little is lost, the product leads to the same choice as the sum of the losses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from project.compression.low_rank.factors import Kind

GRID = 20_000
"""Number of different costs that the dynamic programming distinguishes."""


@dataclass(frozen=True)
class Option:
    """One choice for a layer: its factors, their cost and their error.

    Args:
        kind: the kind of factors, as in :mod:`project.compression.low_rank.factors`; ``dense`` is the layer as it is.
        ranks: the ranks of the factors; empty for ``dense``.
        macs: number of multiply-accumulates for one image, 0 or more.
        error: measure of the loss that this choice causes, 0 or more.
    """

    kind: Kind | Literal["dense"]
    ranks: tuple[int, ...]
    macs: int
    error: float


def choose_within(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Choose one option for each layer, with the least sum of errors, so that all together cost at most ``budget``.

    The result is exact if all costs are multiples of one number and the budget is at most ``GRID`` times this number.
    Otherwise it is approximate: each cost is rounded up to a multiple of ``budget / GRID``. The part of the budget that
    the rounding leaves is given to the layers that gain most. In the end no single layer has a better option that fits.

    Args:
        options: the options of each layer, one or more.
        budget: the most multiply-accumulates of all layers together, 0 or more.

    Raises:
        ValueError: if even the cheapest options cost more than the budget.
    """
    least = sum(min(option.macs for option in choices) for choices in options.values())
    if least > budget:
        raise ValueError(
            f"the layers may cost {budget:.0f} multiply-accumulates, but even with the lowest ranks they cost {least}: "
            "raise macs_left, lower round_to, or include more layers."
        )
    options = {name: _worthwhile(choices) for name, choices in options.items()}
    divisor = math.gcd(*(option.macs for choices in options.values() for option in choices))
    unit = max(divisor, budget / GRID)
    size = math.floor(budget / unit + 1e-9)
    best = np.zeros(size + 1)  # best[c]: least loss of the layers so far, at a cost of at most c units
    picks = []  # for each layer: the number of its option in that least loss, [size + 1]
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
    if np.isinf(best[size]):  # the cheapest options fit, but not after their costs are rounded up
        return _fill(options, {name: choices[0] for name, choices in options.items()}, budget)
    # Follow the picks back, from the last layer to the first.
    chosen, left = {}, size
    for (name, choices), pick in zip(reversed(options.items()), reversed(picks), strict=True):
        chosen[name] = choices[pick[left]]
        left -= math.ceil(chosen[name].macs / unit - 1e-9)
    return _fill(options, {name: chosen[name] for name in options}, budget)


def _worthwhile(choices: Sequence[Option]) -> list[Option]:
    """The options that lose less than every cheaper one, by rising cost."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda option: (option.macs, option.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def _fill(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], budget: float) -> dict[str, Option]:
    """Spend the rest of the budget: make the best single change that fits, until no change fits."""
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
