"""Which range of values eight bits stand for: the observers of post-training quantization.

Krishnamoorthi 2018 (arXiv:1806.08342, sec. 2 and 3.1): ``x = scale * (q - zero_point)``. A wide range loses small
differences, a narrow one clips large values; Nagel et al. 2021 (arXiv:2106.08295, sec. 3.1) compare how to choose:

- ``min-max``: the smallest and the largest value seen; nothing is clipped;
- ``mean-min-max``: the mean over the images of each one's smallest and largest value, which one odd image cannot
  stretch (Jacob et al. 2018, arXiv:1712.05877, sec. 3.1, smooth the extremes of batches);
- ``percentile``: all but a share of the values at either end;
- ``mse``: the range with the smallest mean squared error of what was seen (the paper's eq. 12).

Values are counted in a histogram of 2,048 bins between the extremes of a first pass; within a bin they count as its
middle, so that a chosen end is right to a 2,048th of the values' span.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
Method = Literal["min-max", "mean-min-max", "percentile", "mse"]

NUM_BINS = 2048
_LARGEST_PAIR = 128  # two weights of one sign whose products with 255 add up to less than 2**15
_STEPS = 100  # ends that mse tries, from all of the range down to a hundredth


@dataclass(frozen=True)
class Scale:
    """``x = scale * (q - zero_point)`` with q from 0 to 255."""

    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, low: float, high: float) -> "Scale":
        """The scale of [low, high], widened to hold 0, which padding and ReLU need exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-12)
        return cls(float(np.float32(scale)), round(-low / scale))

    def fake(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """``x`` as it comes back from eight bits."""
        q = np.clip(np.round(x / self.scale) + self.zero_point, 0, 255)
        return (q - self.zero_point) * self.scale


class Observer:
    """Sees the batches ``[N, ...]`` of one tensor twice: :meth:`see_range` for the extremes, then :meth:`count`."""

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
            method: see the module; without :meth:`count` only ``min-max`` and ``mean-min-max``.
            percentile: share of the values, in percent, that ``percentile`` keeps; half of the rest goes at either end.
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
    """A weight as integers and one scale for each row: ``weight`` is about ``integers * scales``.

    Args:
        weight: ``[rows, ...]``, floating point.
        num_bits: bits of an integer, 2 to 8. The integers lie between ``-(2**(num_bits-1) - 1)`` and its opposite.
        method: ``mse`` clips each row where its squared error is smallest; all others clip nothing.
        reduce_range: choose scales with which no two integers of a row that have the same sign add to more than 128 in
            magnitude. x86 processors without VNNI add two products of an unsigned and a signed byte in 16 bits
            (``vpmaddubsw``) and saturate at 32,767; 255 * 128 is below it. So no sum saturates, whichever two
            weights of a row a kernel puts together. ONNX Runtime's ``reduce_range`` keeps each integer within 64
            instead, which is enough as well and coarser.
        smallest: the smallest scale allowed, ``[rows]``; ``None`` allows any.

    Returns:
        ``integers``: int8 of the weight's shape. ``scales``: ``[rows]``, of the weight's type.
    """
    most = 2 ** (num_bits - 1) - 1
    rows = weight.detach().flatten(1)
    magnitudes = rows.abs().amax(1)
    scales = (magnitudes / most).clamp(min=1e-12)
    if reduce_range:
        # A pair may end a rounding error above 128: the factor is one of float32's steps more than that error.
        scales = torch.maximum(scales, _largest_pairs(rows) / _LARGEST_PAIR * (1 + 1e-6))
    if smallest is not None:
        scales = torch.maximum(scales, smallest)
    integers = _to_integers(rows, scales, most)
    if method == "mse":
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
    """The largest sum of two entries of one sign, in magnitude, in each row."""
    count = min(2, rows.shape[1])
    sums = [part.clamp(min=0).topk(count, dim=1).values.sum(1) for part in (rows, -rows)]
    return torch.maximum(*sums)


def _to_integers(rows: Tensor, scales: Tensor, most: int) -> Tensor:
    return (rows / scales[:, None]).round().clamp(-most, most)


def _squared_error(rows: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    return (integers * scales[:, None] - rows).square().sum(1)
