"""Units of the same kind, made of the slots that only can go together.

DepGraph: towards any structural pruning, Fang et al. 2023 (arXiv:2301.12900), section 3: a group is a set of parameters
whose sizes depend on each other. Here it is a set of units that have the same slices.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from project.compression.thinning.couplings import Couplings
from project.compression.thinning.slots import Slots

Slice = tuple[str, int]
"""The name of a parameter or buffer, and one of its dimensions."""


@dataclass(frozen=True)
class Units:
    """Units of the same kind: they have the same number of indices in the same parameters.

    Example::

        >>> from torch import nn
        >>> from project.compression import units_of
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> units = units_of(net, image_shape=(1, 8, 8))["0"]
        >>> units.num, units.parameters, units.readers
        (8, ('0.weight', '0.bias'), {'3': 16})

    Args:
        layers: names of the layers whose outputs are the units, in the order of the net. There are several if, for
            example, a residual connection adds their outputs together.
        slices: indices of every unit in each dimension of a parameter or buffer, ``[num, indices a unit]``. The
            outputs of the first layer come first.
        read: the slices in which a layer reads the units, and does not make them.
        values: number of values in a norm's statistic if one unit is left, above 0; infinity if no norm takes
            statistics over these units. If one does, a unit matters even if nothing reads it.
        buffers: names in ``slices`` that are no parameters, such as running statistics.
    """

    layers: tuple[str, ...]
    slices: dict[Slice, Tensor]
    read: frozenset[Slice]
    values: float = math.inf
    buffers: frozenset[str] = frozenset()

    @property
    def num(self) -> int:
        """Number of units, 1 or more."""
        return len(next(iter(self.slices.values())))

    @property
    def fewest(self) -> int:
        """Number of units that must stay, 1 or 2. A norm that takes its statistics over one value gives a constant."""
        return min(2, self.num) if self.values <= 1 else 1

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of the other layers with the same units."""
        return self.layers[1:]

    def outputs(self, units: Sequence[int]) -> list[int]:
        """The numbers of the first layer's outputs that are these units: one for a channel, several for a head.

        Args:
            units: numbers of units, each from 0 to below ``num``.
        """
        return next(iter(self.slices.values()))[list(units)].flatten().tolist()

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that belong to the units and do not only read them; the first is a layer's weight."""
        made = (name for name, dim in self.slices if (name, dim) not in self.read and name not in self.buffers)
        return tuple(dict.fromkeys(made))

    @cached_property
    def readers(self) -> dict[str, int]:
        """The layers that read the units, each with the number of its inputs that one unit fills."""
        return {name.rpartition(".")[0]: self.slices[name, dim].shape[1] for name, dim in sorted(self.read)}


def groups_of(c: Couplings, parameters: Sequence[str], buffers: Sequence[str]) -> dict[str, Units]:
    """Put the sets of slots that can be removed into groups of equal kind."""
    names = (*parameters, *buffers)
    axes = {(name, dim): axis for name in names for dim, axis in enumerate(c.owned[name]) if axis is not None}
    pairs, values = list(axes), np.full(c.joined.num, np.inf)
    names_of: dict[int, list[str]] = defaultdict(list)  # all names of a shared tensor, by its label
    for name, label in c.owned.items():
        names_of[id(label)].append(name)
    for mixing in c.mixing.values():
        for axis in mixing.axes.values():
            roots, counts = np.unique(c.root[axis], return_counts=True)
            values[roots] = np.minimum(values[roots], counts * mixing.values)
    groups: dict[str, Units] = {}
    for kind, numbers in _kinds(c, list(axes.values())).items():
        slices: dict[Slice, Tensor] = {}
        read: set[Slice] = set()
        layers: list[str] = []
        made: list[Slice] = []
        begin = 0
        for pair, count in kind:
            (name, dim), axis = pairs[pair], axes[pairs[pair]]
            slices[name, dim] = torch.from_numpy(numbers[:, begin : begin + count].copy())
            begin += count
            if c.makes[axis].any():
                layers += [each.rpartition(".")[0] for each in names_of[id(c.owned[name])]]
                made.append((name, dim))
            elif c.reads[axis].any():
                read.add((name, dim))
        if layers:
            # the outputs of the first layer come first: a net may define what reads them before it
            slices = {made[0]: slices[made[0]], **slices}
            first = axes[pairs[kind[0][0]]][numbers[0, 0]]
            key, number = layers[0], 2
            while key in groups:
                key, number = f"{layers[0]} ({number})", number + 1
            named = tuple(dict.fromkeys(layers))
            of_buffers = frozenset(name for name, _ in slices if name in buffers)
            groups[key] = Units(named, slices, frozenset(read), float(values[c.root[first]]), of_buffers)
    return groups


def _kinds(c: Couplings, axes: Sequence[Slots]) -> dict[tuple[tuple[int, int], ...], Any]:
    """The sets of slots that can be removed, by their kind.

    A kind is the number of indices in each axis, as pairs (number of the axis, number of indices). Its sets are the
    rows of an array, which holds the indices axis after axis.
    """
    slots = np.concatenate([np.zeros(0, int), *axes])
    which = np.repeat(np.arange(len(axes)), [len(axis) for axis in axes])
    index = np.concatenate([np.zeros(0, int), *(np.arange(len(axis)) for axis in axes)])
    roots = c.root[slots]
    free = ~np.isin(roots, np.fromiter(c.reasons, int, len(c.reasons)))
    order = np.flatnonzero(free)[np.lexsort((index[free], which[free], roots[free]))]
    roots, which, index = roots[order], which[order], index[order]
    sets: dict[tuple[tuple[int, int], ...], list[Any]] = defaultdict(list)
    begins = np.flatnonzero(np.diff(roots, prepend=-1)).tolist()
    for begin, end in zip(begins, [*begins[1:], len(roots)], strict=True):
        members, counts = np.unique(which[begin:end], return_counts=True)
        sets[tuple(zip(members.tolist(), counts.tolist(), strict=True))].append(index[begin:end])
    return {kind: np.stack(rows) for kind, rows in sets.items()}
