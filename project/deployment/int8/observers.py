"""Observers of post-training quantization: they choose the range of values that eight bits stand for.

Krishnamoorthi 2018 (arXiv:1806.08342, sec. 2 and 3.1): ``x = scale * (q - zero_point)``. A wide range loses small
differences, and a narrow one clips large values. Nagel et al. 2021 (arXiv:2106.08295, sec. 3.1) compare the choices:

- ``min-max``: from the smallest to the largest value seen. Nothing is clipped;
- ``mean-min-max``: from the mean over the images of their smallest values to the mean of their largest ones. A single
  unusual image hardly changes it (Jacob et al. 2018, arXiv:1712.05877, sec. 3.1, smooth the extremes of batches);
- ``percentile``: all values except for a share at either end;
- ``mse``: the range with the smallest mean squared error over the values seen (eq. 12 of Nagel et al.).

A first pass finds the extremes. A second pass counts the values in a histogram of 2,048 bins between them. Each value
counts as the middle of its bin, so the chosen ends are accurate to 1/2,048 of the distance between the extremes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
Method = Literal["min-max", "mean-min-max", "percentile", "mse"]

NUM_BINS = 2048
"""Number of bins of the histogram."""
_LARGEST_PAIR = 128
"""Largest sum of two integer weights of the same sign whose products with 255 add up to less than 2**15."""
_STEPS = 100
"""Number of ranges that ``mse`` tries, from the whole range down to a hundredth of it."""


@dataclass(frozen=True)
class Scale:
    """How an activation becomes eight bits: ``x = scale * (q - zero_point)`` with q from 0 to 255.

    Args:
        scale: distance between two neighbouring values; above 0.
        zero_point: integer that stands for 0, from 0 to 255.
    """

    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, low: float, high: float) -> "Scale":
        """The smallest scale that reaches from ``low`` to ``high`` and has an exact integer for 0.

        Padding and ReLU need an exact 0, so the range is widened until it holds 0 and one end lies on an integer. If
        both ends were cut off by half a step instead, all pixels from -1 to 1 would lie between two integers. Engines
        round such ties differently.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        exact = -low / max((high - low) / 255, 1e-12)
        scale, zero_point = min((_step(low, high, zero), zero) for zero in (math.floor(exact), math.ceil(exact)))
        return cls(float(np.float32(max(scale, 1e-12))), zero_point)

    def fake(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """``x`` after rounding to eight bits and back."""
        q = np.clip(np.round(x / self.scale) + self.zero_point, 0, 255)
        return (q - self.zero_point) * self.scale


def _step(low: float, high: float, zero_point: int) -> float:
    """The smallest scale with which integers from 0 to 255 reach from ``low`` to ``high``, given the integer of 0."""
    if (low < 0 and zero_point == 0) or (high > 0 and zero_point == 255):
        return math.inf
    return max(-low / max(zero_point, 1), high / max(255 - zero_point, 1))


class Observer:
    """Collects the values of one tensor, given as batches ``[N, ...]``.

    Give it all batches twice: first to :meth:`see_range`, which finds the extremes, then to :meth:`count`.
    """

    def __init__(self) -> None:
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.counts = np.zeros(NUM_BINS, dtype=np.int64)

    @property
    def low(self) -> float:
        return min(self.lows, default=0.0)

    @property
    def high(self) -> float:
        return max(self.highs, default=0.0)

    def see_range(self, x: Array) -> None:
        images = x.reshape(len(x), -1)
        self.lows += images.min(1).tolist()
        self.highs += images.max(1).tolist()

    def count(self, x: Array) -> None:
        low, high = self.low, self.high
        if high > low:
            self.counts += np.histogram(x, NUM_BINS, (low, high))[0]

    def scale(self, method: Method, percentile: float = 99.99) -> Scale:
        """The scale of the values seen.

        Args:
            method: name of a method that the module's docstring describes. ``percentile`` and ``mse`` need
                :meth:`count` first.
            percentile: share of the values that ``percentile`` keeps, in percent, above 50 and up to 100. Half of the
                rest is clipped at either end.
        """
        if method == "mean-min-max":
            return Scale.of_range(float(np.mean(self.lows)), float(np.mean(self.highs)))
        low, high = self.low, self.high
        if method == "min-max" or not self.counts.any():
            return Scale.of_range(low, high)
        edges = np.linspace(low, high, NUM_BINS + 1)
        if method == "percentile":
            shares = self.counts.cumsum() / self.counts.sum()
            cut = (1 - percentile / 100) / 2
            first, last = int(np.searchsorted(shares, cut)), int(np.searchsorted(shares, 1 - cut))
            return Scale.of_range(float(edges[first]), float(edges[min(last, NUM_BINS - 1) + 1]))
        middles = (edges[:-1] + edges[1:]) / 2

        def error(scale: Scale) -> float:
            return float(np.dot(self.counts, (middles - scale.fake(middles)) ** 2))

        shrunk = [factor / _STEPS for factor in range(_STEPS, 0, -1)]
        return min((Scale.of_range(low * f, high * f) for f in shrunk), key=error)


def round_weight(
    weight: Tensor,
    num_bits: int,
    method: Method = "min-max",
    *,
    reduce_range: bool = False,
    smallest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Round a weight to integers with one scale for each row: ``weight`` is about ``integers * scales``.

    Args:
        weight: floating point tensor ``[rows, ...]``.
        num_bits: number of bits of an integer, 2 to 8. The integers lie between ``-(2**(num_bits-1) - 1)`` and
            ``2**(num_bits-1) - 1``.
        method: name of the method. ``mse`` clips each row where its squared error is smallest; the others clip nothing.
        reduce_range: whether to choose scales with which no two integers of a row that have the same sign add to more
            than 128 in magnitude. x86 processors without VNNI add two products of an unsigned and a signed byte in 16
            bits (``vpmaddubsw``) and saturate at 32,767. 255 * 128 is below it. So no sum saturates, whichever two
            weights of a row a kernel adds. ONNX Runtime's ``reduce_range`` keeps each integer within 64 instead, which
            also suffices but is coarser.
        smallest: smallest scale allowed for each row, ``[rows]``; ``None`` allows any.

    Returns:
        ``integers``: int8 tensor of the weight's shape. ``scales``: tensor ``[rows]`` of the weight's type.
    """
    most = 2 ** (num_bits - 1) - 1
    rows = weight.detach().flatten(1)
    magnitudes = rows.abs().amax(1)
    scales = (magnitudes / most).clamp(min=1e-12)
    if reduce_range:
        # Rounding errors of float32 may bring a pair slightly above 128. The factor is larger than these errors.
        scales = torch.maximum(scales, _largest_pairs(rows) / _LARGEST_PAIR * (1 + 1e-6))
    if smallest is not None:
        scales = torch.maximum(scales, smallest)
    integers = _to_integers(rows, scales, most)
    if method == "mse":
        # Try smaller scales for each row, which clip its largest weights, and keep the one with the smallest error.
        limit = min(most, _LARGEST_PAIR // 2) if reduce_range else most
        error = _squared_error(rows, integers, scales)
        for factor in torch.linspace(1, 0.3, 36).tolist():
            tried = (magnitudes / limit * factor).clamp(min=1e-12)
            if smallest is not None:
                tried = torch.maximum(tried, smallest)
            candidate = _to_integers(rows, tried, limit)
            better = (new := _squared_error(rows, candidate, tried)) < error
            scales, error = torch.where(better, tried, scales), torch.where(better, new, error)
            integers = torch.where(better[:, None], candidate, integers)
    return integers.to(torch.int8).view_as(weight), scales


def _largest_pairs(rows: Tensor) -> Tensor:
    """For each row: the largest magnitude of a sum of two entries that have the same sign."""
    count = min(2, rows.shape[1])
    sums = [part.clamp(min=0).topk(count, dim=1).values.sum(1) for part in (rows, -rows)]
    return torch.maximum(*sums)


def _to_integers(rows: Tensor, scales: Tensor, most: int) -> Tensor:
    return (rows / scales[:, None]).round().clamp(-most, most)


def _squared_error(rows: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    return (integers * scales[:, None] - rows).square().sum(1)
