"""Slots: numbers for the indices of every dimension of a net's parameters, and what is known about them.

Slots that only can go together are joined. :mod:`project.compression.thinning.couplings` finds which.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Slots = np.ndarray[Any, np.dtype[np.int64]]
Axis = Slots | None
"""The slots of one dimension; ``None`` for a dimension that is not followed."""
Label = tuple[Axis, ...]
"""One axis for each dimension of a tensor."""


class Joined:
    """Slots, and which of them can only be removed together."""

    def __init__(self) -> None:
        self.num = 0
        self._pairs: list[tuple[Slots, Slots]] = []
        self._fixed: list[tuple[Slots, str]] = []

    def new(self, count: int) -> Slots:
        """New slots.

        Args:
            count: number of slots, 0 or more.
        """
        self.num += count
        return np.arange(self.num - count, self.num)

    def join(self, a: Axis, b: Axis, why: str = "it meets a tensor that is not sliced with it") -> None:
        """Let the slots at equal positions go together. If one axis is not followed, the other stays as it is.

        Args:
            a, b: axes of the same length.
            why: reason to keep the slots of one axis if the other is ``None``.
        """
        if a is None or b is None:
            self.fix(a, why)
            self.fix(b, why)
        elif a is not b:
            self._pairs.append((a, b))

    def fix(self, slots: Axis, why: str) -> None:
        """Let slots stay. The first reason counts.

        Args:
            slots: axis whose slots stay; nothing happens for ``None``.
            why: the reason, a main clause.
        """
        if slots is not None and slots.size:
            self._fixed.append((slots, why))

    def solve(self) -> tuple[Slots, dict[int, str]]:
        """The smallest slot of each slot's set, and the reason for each set that must stay, by its smallest slot."""
        root = np.arange(self.num)
        if self._pairs:
            a, b = (np.concatenate([pair[side].ravel() for pair in self._pairs]) for side in (0, 1))
            while True:
                ra, rb = root[a], root[b]
                if (ra == rb).all():
                    break
                np.minimum.at(root, np.maximum(ra, rb), np.minimum(ra, rb))
                while (root[root] != root).any():
                    root = root[root]
        reasons: dict[int, str] = {}
        for slots, why in self._fixed:
            for one in np.unique(root[slots.ravel()]).tolist():
                reasons.setdefault(one, why)
        return root, reasons


@dataclass(frozen=True)
class View:
    """A change of shape that states the size of a followed dimension, such as the number of heads of attention.

    Args:
        module: name of the module in whose forward pass this happens.
        sizes: sizes of the new dimensions that a dimension is cut into, or that dimensions are joined to.
        free: position of the one whose indices can be removed.
        slots: slots of this dimension.
        shape: the whole new shape.
        place: position in ``shape`` of the dimension whose indices can be removed.
    """

    module: str
    sizes: tuple[int, ...]
    free: int
    slots: Slots
    shape: tuple[int, ...]
    place: int


@dataclass(frozen=True)
class Split:
    """A split of a followed dimension into parts.

    Args:
        module: name of the module in whose forward pass this happens.
        parts: slots of each part.
    """

    module: str
    parts: tuple[Slots, ...]


@dataclass(frozen=True)
class Mixing:
    """A call of a function that computes statistics over channels.

    Args:
        function: name of the function in ``torch.nn.functional``.
        axes: slots of each dimension of its input over which it computes statistics, by the dimension.
        values: number of values that one slot adds to a statistic, such as the number of pixels; infinity if each
            slot has its own statistic.
    """

    function: str
    axes: dict[int, Slots]
    values: float


@dataclass(frozen=True)
class Product:
    """The multiply-accumulates of one convolution or matrix product: a constant times the sizes of some dimensions.

    Args:
        module: name of the module in whose forward pass this happens.
        constant: multiply-accumulates for one channel of each axis, above 0.
        axes: slots of each followed dimension.
    """

    module: str
    constant: float
    axes: tuple[Slots, ...]
