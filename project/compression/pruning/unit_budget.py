"""The choice of units over all layers: the least saliency per unit, or per multiply-accumulate (MAC) that is saved.

It is a greedy knapsack. Each step removes the units with the least ratio of saliency to cost, as in latency-aware
pruning (Shen et al. 2022, arXiv:2110.10811, sec. 3.2), here with MACs as the cost. The cost that a step saves beyond
the budget does not count.

The cost of a unit depends on the units that are left. A convolution's MACs are pixels x kernel x inputs x outputs, so
that the units of a layer become cheaper while its input loses channels. After each step the costs of the units that it
concerns are counted again. A step removes as many units of one layer as bring its width to the next multiple of
``round_to``, or one unit of a layer that has no more units than ``round_to``.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from project.compression.thinning.groups import Units
from project.compression.thinning.units import trace


class Cost(Protocol):
    """What a net costs, while units are removed."""

    total: float
    """The cost of what is left."""

    def saved(self, name: str, num: int) -> float:
        """What the removal of ``num`` further units of a group would save."""

    def remove(self, name: str, num: int) -> set[str]:
        """Remove ``num`` units of a group; the groups whose units cost something else now, this one too."""


class Count:
    """Each unit costs 1.

    Args:
        widths: number of units of each group.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.total: float = sum(widths.values())

    def saved(self, name: str, num: int) -> float:
        return num

    def remove(self, name: str, num: int) -> set[str]:
        self.total -= num
        return {name}


class Macs:
    """Multiply-accumulates of a net for one image, while units are removed.

    The count is exact: it is a sum over all convolutions and matrix products of a constant times the sizes of their
    dimensions, and each unit makes some of the dimensions smaller.

    Args:
        net: net with all its units; it is not changed.
        image_shape: shape (C, H, W) of an image.
        groups: the units that can be removed, by the name of their group.
    """

    def __init__(self, net: nn.Module, image_shape: tuple[int, int, int], groups: Mapping[str, Units]) -> None:
        couplings = trace(net, image_shape).couplings
        group_of = np.full(couplings.joined.num, -1)  # by root
        names = list(groups)
        self._widths = {name: units.num for name, units in groups.items()}
        for number, units in enumerate(groups.values()):
            (name, dim), indices = next(iter(units.slices.items()))
            axis = couplings.owned[name][dim]
            assert axis is not None
            group_of[couplings.root[axis[indices[:, 0].numpy()]]] = number
        products = couplings.products
        self._constants = np.array([product.constant for product in products])
        self._whole = np.ones((len(products), max((len(product.axes) for product in products), default=1)))
        # for each group the products that it concerns: rows, columns, and the size that one unit takes of the dimension
        found: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
        for row, product in enumerate(products):
            for column, axis in enumerate(product.axes):
                self._whole[row, column] = len(axis)
                numbers, counts = np.unique(group_of[couplings.root[axis]], return_counts=True)
                for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                    if number >= 0:
                        found[names[number]].append((row, column, count / self._widths[names[number]]))
        self._places = {name: np.array(found[name]).reshape(-1, 3).T for name in names}
        self._rows = {name: np.unique(places[0]).astype(int) for name, places in self._places.items()}
        concerned: dict[int, set[str]] = defaultdict(set)
        for name, rows in self._rows.items():
            for row in rows.tolist():
                concerned[row].add(name)
        self._concerned = concerned
        self._sizes = self._whole.copy()
        self.total = self._sum(self._sizes)

    def __call__(self, kept: Mapping[str, int]) -> float:
        """The multiply-accumulates if each group keeps this number of its units.

        Args:
            kept: number of units by the name of the group; a group that is not named keeps all.
        """
        sizes = self._whole.copy()
        for name, count in kept.items():
            self._shrink(sizes, name, self._widths[name] - count)
        return self._sum(sizes)

    def saved(self, name: str, num: int) -> float:
        rows = self._rows[name]
        before = self._sizes[rows].copy()
        self._shrink(self._sizes, name, num)
        after = self._sizes[rows].copy()
        self._sizes[rows] = before
        return float((self._constants[rows] * (before.prod(1) - after.prod(1))).sum())

    def remove(self, name: str, num: int) -> set[str]:
        self._shrink(self._sizes, name, num)
        self.total = self._sum(self._sizes)
        return {other for row in self._rows[name].tolist() for other in self._concerned[row]} | {name}

    def _shrink(self, sizes: np.ndarray, name: str, num: int) -> None:
        rows, columns, share = self._places[name]
        np.subtract.at(sizes, (rows.astype(int), columns.astype(int)), num * share)

    def _sum(self, sizes: np.ndarray) -> float:
        return float((self._constants * sizes.prod(1)).sum())


def step_of(num_units: int, round_to: int) -> int:
    """The number of units that one step removes from a layer.

    Args:
        num_units: number of units of the layer, 1 or more.
        round_to: divisor of the width, 1 or more.
    """
    return round_to if num_units > round_to else 1


def least_units(num_units: int, keep: float, round_to: int, fewest: int = 1) -> int:
    """The least number of units that a layer keeps.

    Args:
        num_units: number of units of the layer, 1 or more.
        keep: share of the units that stays, in [0, 1).
        round_to: divisor of the width, 1 or more.
        fewest: number of units that must stay, 1 or more.
    """
    step = step_of(num_units, round_to)
    # at least the share `keep`, at least the fewest, and whole steps
    return math.ceil(max(math.ceil(keep * num_units), fewest) / step) * step


def take_cheapest(
    scores: Mapping[str, Tensor],
    left: Mapping[str, Tensor],
    amount: float,
    *,
    keep: float = 0.0,
    round_to: int | Mapping[str, int] = 1,
    cost: Cost | None = None,
    widths: Mapping[str, int] | None = None,
    fewest: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The masks ``left`` without the units of least saliency for their cost.

    Args:
        scores: saliency of each layer's units ``[num_units]``, 0 or more.
        left: whether each unit is still there, bools ``[num_units]`` for each layer.
        amount: share of the present cost that is removed, in [0, 1). The last step may remove too much, by less than
            ``round_to`` units of one layer.
        keep: share of each layer's ``num_units`` that stays, in [0, 1).
        round_to: divisor of the widths, 1 or more, of all layers or of each. A layer with more units than ``round_to``
            that loses any keeps a multiple of it. Every layer keeps a unit.
        cost: the cost of the whole net, which this function changes; ``None`` counts units.
        widths: number of units that each layer had before the first pruning, of which ``keep`` is a share; ``None`` if
            ``left`` has them all.
        fewest: number of units that each layer keeps at least, 1 or more; ``None`` means 1 for all.

    Raises:
        ValueError: if ``keep`` and ``round_to`` protect so many units that ``amount`` cannot be removed.
    """
    # For each layer, the units from the least score to the largest, and the sums of these scores: units are removed in
    # this order. Units that are gone already have the score infinity and so come last.
    orders = {
        name: score.masked_fill(~left[name], torch.inf).sort(stable=True).indices for name, score in scores.items()
    }
    sums = {name: torch.cumsum(score[orders[name]].double(), 0).tolist() for name, score in scores.items()}
    present = {name: int(mask.sum()) for name, mask in left.items()}
    step_to = round_to if isinstance(round_to, Mapping) else dict.fromkeys(left, round_to)
    whole = {name: (widths or {}).get(name, len(mask)) for name, mask in left.items()}
    must = fewest or {}
    least = {name: least_units(width, keep, step_to[name], must.get(name, 1)) for name, width in whole.items()}
    steps = {name: step_of(width, step_to[name]) for name, width in whole.items()}
    kept = dict(present)
    counted = "units" if cost is None else "multiply-accumulates"
    cost = cost or Count({name: len(mask) for name, mask in left.items()})
    for name, mask in left.items():
        if len(mask) > present[name]:
            cost.remove(name, len(mask) - present[name])

    def offer(name: str) -> tuple[float, float, int] | None:
        """The saliency that the next step of a group removes, the cost that it saves, and the group's width then."""
        fewer = (kept[name] - 1) // steps[name] * steps[name]
        saved = cost.saved(name, kept[name] - fewer) if fewer >= least[name] else 0.0
        if saved <= 0:  # a layer that nothing reaches any more saves nothing
            return None
        gone, then = present[name] - kept[name], present[name] - fewer
        return sums[name][then - 1] - (sums[name][gone - 1] if gone else 0.0), saved, fewer

    target = cost.total - (round(amount * cost.total) if counted == "units" else amount * cost.total)
    offers = {name: offer(name) for name in kept}
    while cost.total > target * (1 + 1e-9):
        open_ = {name: each for name, each in offers.items() if each is not None}
        if not open_:
            raise ValueError(
                f"{100 * amount:g} % of the {counted} that are left are to be pruned, but with keep {keep:g} and "
                f"round_to {max(step_to.values())} the layers can not lose so many: prune less, choose a smaller keep "
                "or round_to, or exclude fewer layers."
            )
        need = cost.total - target
        # what a step saves beyond the need is worth nothing, so that the last step is no larger than it must be
        name = min(open_, key=lambda name: open_[name][0] / min(open_[name][1], need))
        fewer = open_[name][2]
        changed = cost.remove(name, kept[name] - fewer)
        kept[name] = fewer
        offers |= {other: offer(other) for other in changed}
    masks = {}
    for name, mask in left.items():
        masks[name] = mask.clone()
        masks[name][orders[name][: present[name] - kept[name]]] = False
    return masks
