"""K-means of numbers on a line: the squared error to the nearest of k centers, and which centers make it small.

Lloyd 1982, Least squares quantization in PCM; the starts of Han et al. 2016 (arXiv:1510.00149, sec. 3.2 and figure 6).
On a line clusters are intervals: values are sorted once, and a round of Lloyd's needs k binary searches and prefix
sums, never a table of distances. So is the optimum within reach: dynamic programming over intervals (Fisher 1958; Wang
& Song 2011, Ckmeans.1d.dp), whose best last cut moves one way only, which divide and conquer makes use of (Grønlund et
al. 2017, arXiv:1701.07204, sec. 2).
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Start = Literal["linear", "density", "random", "optimal"]
Array = NDArray[np.float64]

_MAX_POINTS = 4096
_MAX_ROUNDS = 1000


def kmeans(values: ArrayLike, num_clusters: int, start: Start = "linear", *, seed: int = 0) -> Array:
    """Centers in ascending order, at most ``num_clusters``; fewer only where there are fewer different values.

    Args:
        values: finite numbers, at least one; of any shape.
        num_clusters: k, 1 or more.
        start: ``linear``: k points at equal distances from the least value to the greatest; ``density``: at equal
            shares of the values; ``random``: k of the values; ``optimal``: the least error there is, of up to 4096
            different values. Of more, the cuts lie between 4096 bins: with W, the error of putting each value to its
            bin's mean, the root of the error is at most ``sqrt(W + (sqrt(optimum) + sqrt(W))^2)``; the rounds that
            follow, as after every start, only make it smaller.
        seed: of the random start.

    Raises:
        ValueError: for no values, values that are not finite, or no clusters.
    """
    x = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}: choose 1 or more.")
    if not len(x) or not np.isfinite(x).all():
        raise ValueError("values are to be clustered, but they are none, or hold NaN or infinity: look at the weights.")
    different = x[np.concatenate([[True], x[1:] > x[:-1]])]
    if len(different) <= num_clusters:
        return different
    if start == "linear":
        centers = np.linspace(x[0], x[-1], num_clusters)
    elif start == "density":
        centers = np.quantile(x, (np.arange(num_clusters) + 0.5) / num_clusters)
    elif start == "random":
        centers = np.sort(np.random.default_rng(seed).choice(different, num_clusters, replace=False))
    else:
        centers = _optimal(x, different, num_clusters)
    return _lloyd(x, centers)


def assign(values: ArrayLike, centers: Array) -> NDArray[np.int64]:
    """The number of the center nearest to each value, in the values' shape; of two, the greater one."""
    return np.searchsorted(_cuts(centers), np.asarray(values, dtype=np.float64), side="right")


def squared_error(values: ArrayLike, centers: Array) -> float:
    """The sum of squared distances to the nearest center."""
    x = np.asarray(values, dtype=np.float64)
    return float(((x - centers[assign(x, centers)]) ** 2).sum())


def _cuts(centers: Array) -> Array:
    return (centers[1:] + centers[:-1]) / 2


def _lloyd(x: Array, centers: Array) -> Array:
    """Centers to the means of what is nearest to them, until nothing changes; one that has nothing stays."""
    sums = np.concatenate([[0.0], np.cumsum(x)])
    before = None
    for _ in range(_MAX_ROUNDS):
        bounds = np.concatenate([[0], np.searchsorted(x, _cuts(centers)), [len(x)]])
        if before is not None and (bounds == before).all():
            break
        counts = np.diff(bounds)
        means = np.diff(sums[bounds]) / np.maximum(counts, 1)
        centers, before = np.where(counts > 0, means, centers), bounds
    return centers


def _optimal(x: Array, different: Array, num_clusters: int) -> Array:
    edges = different[1:]
    if len(different) > _MAX_POINTS:  # where values are dense cuts have to be dense too, but tails count as well
        half = _MAX_POINTS // 2
        edges = np.unique([*np.linspace(x[0], x[-1], half)[1:], *np.quantile(x, np.arange(1, half) / half)])
    bounds = np.unique(np.concatenate([[0], np.searchsorted(x, edges), [len(x)]]))
    centered = x - x.mean()
    count, total, squares = (np.concatenate([[0.0], np.cumsum(centered**power)])[bounds] for power in (0, 1, 2))
    cuts = bounds[_best_cuts(count, total, squares, num_clusters)]
    return np.diff(np.concatenate([[0.0], np.cumsum(x)])[cuts]) / np.diff(cuts)


def _best_cuts(count: Array, total: Array, squares: Array, num_clusters: int) -> NDArray[np.int64]:
    """Where to cut points in a row into intervals of least squared error: ``num_clusters + 1`` indices.

    Args:
        count, total, squares: prefix sums over the points, beginning with 0: of values, of their sum and squares.
    """

    def cost(start: NDArray[np.int64], stop: NDArray[np.int64]) -> Array:
        mass = total[stop] - total[start]
        return np.maximum(squares[stop] - squares[start] - mass * mass / (count[stop] - count[start]), 0)

    num_points = len(count) - 1
    everything = np.arange(1, num_points + 1)
    least = np.concatenate([[0.0], cost(np.zeros_like(everything), everything)])  # of the first points in one interval
    cut_at = []
    for used in range(1, num_clusters):
        cut = np.zeros(num_points + 1, dtype=np.int64)
        better = np.full(num_points + 1, np.inf)
        stops = np.arange(used + 1, num_points + 1)
        stride = 1 << len(stops).bit_length()
        while stride := stride // 2:  # the middle ones first: their cuts bound those between them
            at = np.arange(stride - 1, len(stops), 2 * stride)
            stop = stops[at]
            low = np.where(at >= stride, cut[stops[np.maximum(at - stride, 0)]], used)
            after = at + stride
            high = np.where(after < len(stops), cut[stops[np.minimum(after, len(stops) - 1)]], num_points)
            num_tried = np.minimum(high, stop - 1) - low + 1
            begins = np.cumsum(num_tried) - num_tried
            tried = np.arange(num_tried.sum()) - np.repeat(begins - low, num_tried)
            errors = least[tried] + cost(tried, np.repeat(stop, num_tried))
            best = np.minimum.reduceat(errors, begins)
            hits = np.flatnonzero(errors == np.repeat(best, num_tried))
            cut[stop], better[stop] = tried[hits[np.searchsorted(hits, begins)]], best
        least = better
        cut_at.append(cut)
    cuts = [num_points]
    for cut in reversed(cut_at):
        cuts.append(int(cut[cuts[-1]]))
    return np.array([0, *reversed(cuts)])
