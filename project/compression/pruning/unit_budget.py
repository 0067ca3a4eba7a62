"""The choice of units over all layers: the least saliency per unit, or per multiply-accumulate (MAC) that is saved.

It is a greedy knapsack. Each step removes the units with the least ratio of saliency to cost, as in latency-aware
pruning (Shen et al. 2022, arXiv:2110.10811, sec. 3.2), here with MACs as the cost.

The cost of a unit depends on the units that are left. A convolution's MACs are pixels x kernel x inputs x outputs, so
that the units of a layer become cheaper while its input loses channels. Each step therefore counts the net's MACs
again. A step removes as many units of one layer as bring its width to the next multiple of ``round_to``, or one unit of
a layer that has no more units than ``round_to``.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from project.metrics.complexity import complexity_by_layer

Writers = tuple[str, ...]
Readers = Mapping[str, int]


class Macs:
    """Multiply-accumulates of a net for one image, as a function of the number of units that its layers keep.

    The count is exact for convolutions and linear layers. Other multiplications, such as those of attention, are
    counted as in the whole net.

    Args:
        net: the net with all its units.
        image_shape: shape (C, H, W) of an image.
        groups: the layers whose outputs are a group's units, and the layers that read them, each with the number of its
            inputs that one unit fills. The key of a group is the name of its first layer.
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
        """The multiply-accumulates of the whole net if each group keeps ``kept`` units."""
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
    """The number of units that one step removes from a layer of ``num_units`` units."""
    return round_to if num_units > round_to else 1


def least_units(num_units: int, keep: float, round_to: int) -> int:
    """The least number of units that a layer of ``num_units`` units keeps."""
    step = step_of(num_units, round_to)
    # at least the share `keep`, at least one unit if round_to is above 1, and whole steps
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
    """The masks ``left`` without the units of least saliency for their cost.

    Args:
        scores: saliency of each layer's units ``[num_units]``, 0 or more.
        left: whether each unit is still there, bools ``[num_units]`` for each layer.
        amount: share that is removed, in [0, 1), of the units that are left, or with ``macs`` of the present
            multiply-accumulates. The last step may remove too much, by less than ``round_to`` units of one layer.
        keep: share of each layer's ``num_units`` that stays, in [0, 1).
        round_to: divisor of the widths, 1 or more. A layer with more units than ``round_to`` that loses any keeps a
            multiple of it. Above 1 every layer keeps some units. At 1, and with ``keep`` 0, a layer may lose all: the
            caller must refuse this.
        macs: counter of the cost in multiply-accumulates; ``None`` counts units.

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
    least = {name: least_units(len(mask), keep, round_to) for name, mask in left.items()}
    steps = {name: step_of(len(mask), round_to) for name, mask in left.items()}
    kept = dict(present)

    def cost(counts: Mapping[str, int]) -> float:
        return sum(counts.values()) if macs is None else macs(counts)

    now = cost(kept)
    target = now - round(amount * now) if macs is None else (1 - amount) * now
    while now > target * (1 + 1e-9):
        best: tuple[float, str, int, float] | None = None  # saliency per cost, layer, its new width, the new cost
        for name, count in kept.items():
            fewer = (count - 1) // steps[name] * steps[name]
            after = cost({**kept, name: max(fewer, 0)})
            if fewer < least[name] or after >= now:  # a layer that nothing reaches any more saves nothing
                continue
            gone, then = present[name] - count, present[name] - fewer
            value = sums[name][then - 1] - (sums[name][gone - 1] if gone else 0.0)
            if best is None or value / (now - after) < best[0]:
                best = (value / (now - after), name, fewer, after)
        if best is None:
            what = "units" if macs is None else "multiply-accumulates"
            raise ValueError(
                f"{100 * amount:g} % of the {what} that are left are to be pruned, but with keep {keep:g} and round_to "
                f"{round_to} the layers can not lose so many: prune less, choose a smaller keep or round_to, or "
                "exclude fewer layers."
            )
        _, name, kept[name], now = best
    masks = {}
    for name, mask in left.items():
        masks[name] = mask.clone()
        masks[name][orders[name][: present[name] - kept[name]]] = False
    return masks
