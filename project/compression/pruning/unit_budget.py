"""Which units go when all layers compete: the least saliency per unit, or per multiply-accumulate that goes with it.

A greedy knapsack: the value of a step over its cost, as latency-aware pruning does it (Shen et al. 2022,
arXiv:2110.10811, sec. 3.2), with multiply-accumulates (MACs) for cost. What a unit costs depends on what is left: a
convolution's MACs are pixels x kernel x inputs x outputs, so that units of a layer get cheaper while its input shrinks.
Each step therefore counts the net anew. A step is as many units of one layer as bring it to the next multiple of
``round_to``; of a layer with no more units than that, it is one unit.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from project.metrics.complexity import complexity_by_layer

Writers = tuple[str, ...]
Readers = Mapping[str, int]


class Macs:
    """Multiply-accumulates of a net for one image, as a function of the units that its layers keep.

    Exact for convolutions and linear layers; what else multiplies (attention) is counted as in the whole net.

    Args:
        net: with all its units.
        image_shape: (C, H, W).
        groups: name -> (layers whose outputs are the group's units, layers that read them -> inputs for each unit).
    """

    def __init__(
        self, net: nn.Module, image_shape: tuple[int, int, int], groups: Mapping[str, tuple[Writers, Readers]]
    ) -> None:
        self.dense = {row.name: row.macs for row in complexity_by_layer(net, image_shape) if row.macs}
        layers = {name: net.get_submodule(name) for name in self.dense}
        self._shapes = {
            name: (layer.weight.shape[0], layer.weight.shape[1]) if isinstance(layer, nn.Conv2d | nn.Linear) else (1, 1)
            for name, layer in layers.items()
        }
        self._groups = groups

    def __call__(self, kept: Mapping[str, int]) -> float:
        """Of the whole net, with ``kept`` units in each group."""
        outputs = {name: shape[0] for name, shape in self._shapes.items()}
        inputs = {name: shape[1] for name, shape in self._shapes.items()}
        for group, (writers, readers) in self._groups.items():
            gone = self._shapes[group][0] - kept[group]
            for layer in writers:
                outputs[layer] -= gone
            for layer, inputs_per_unit in readers.items():
                inputs[layer] -= gone * inputs_per_unit
        return sum(
            macs * (outputs[name] / self._shapes[name][0]) * (inputs[name] / self._shapes[name][1])
            for name, macs in self.dense.items()
        )


def step_of(num_units: int, round_to: int) -> int:
    """How many units of a layer of ``num_units`` go at once."""
    return round_to if num_units > round_to else 1


def least_units(num_units: int, keep: float, round_to: int) -> int:
    """How many units a layer of ``num_units`` never goes below."""
    step = step_of(num_units, round_to)
    return math.ceil(max(math.ceil(keep * num_units), min(round_to - 1, 1)) / step) * step


def take_cheapest(
    scores: Mapping[str, Tensor],
    left: Mapping[str, Tensor],
    amount: float,
    *,
    keep: float = 0.0,
    round_to: int = 1,
    macs: Macs | None = None,
) -> dict[str, Tensor]:
    """``left`` without the units that are worth least for what they cost.

    Args:
        scores: saliency of each layer's units ``[num_units]``, ≥ 0.
        left: which of them are there, ``[num_units]`` of bool.
        amount: share that goes, in [0, 1), of the units that are left, or with ``macs`` of its count; the last step may
            overshoot by less than ``round_to`` units of one layer.
        keep: share of each layer's ``num_units`` that stays.
        round_to: a layer of more units than this that loses any keeps a multiple of it, and above 1 every layer keeps
            some. At 1 and without ``keep`` a layer may lose all: the caller refuses.
        macs: counts the cost; ``None`` counts units.

    Raises:
        ValueError: when not so much can go.
    """
    orders = {
        name: score.masked_fill(~left[name], torch.inf).sort(stable=True).indices for name, score in scores.items()
    }
    sums = {name: torch.cumsum(score[orders[name]].double(), 0).tolist() for name, score in scores.items()}
    present = {name: int(mask.sum()) for name, mask in left.items()}
    least = {name: least_units(len(mask), keep, round_to) for name, mask in left.items()}
    steps = {name: step_of(len(mask), round_to) for name, mask in left.items()}
    kept = dict(present)

    def cost(counts: Mapping[str, int]) -> float:
        return sum(counts.values()) if macs is None else macs(counts)

    now = cost(kept)
    target = now - round(amount * now) if macs is None else (1 - amount) * now
    while now > target * (1 + 1e-9):
        best: tuple[float, str, int, float] | None = None
        for name, count in kept.items():
            fewer = (count - 1) // steps[name] * steps[name]
            after = cost({**kept, name: max(fewer, 0)})
            if fewer < least[name] or after >= now:  # where nothing arrives any more, nothing can be saved
                continue
            gone, then = present[name] - count, present[name] - fewer
            value = sums[name][then - 1] - (sums[name][gone - 1] if gone else 0.0)
            if best is None or value / (now - after) < best[0]:
                best = (value / (now - after), name, fewer, after)
        if best is None:
            what = "units" if macs is None else "multiply-accumulates"
            raise ValueError(
                f"{100 * amount:g} % of the {what} that are left are to go, but with keep {keep:g} and round_to "
                f"{round_to} the layers can not lose so many: prune less, choose a smaller keep or round_to, or "
                "exclude fewer layers."
            )
        _, name, kept[name], now = best
    masks = {}
    for name, mask in left.items():
        masks[name] = mask.clone()
        masks[name][orders[name][: present[name] - kept[name]]] = False
    return masks
