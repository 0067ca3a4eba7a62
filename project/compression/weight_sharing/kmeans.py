"""K-means of numbers: finds k centers with a small sum of squared distances from each number to its nearest center.

Lloyd 1982, Least squares quantization in PCM. The starts are those of Han et al. 2016 (arXiv:1510.00149, sec. 3.2 and
figure 6). In one dimension each cluster is an interval. So the values are sorted once, and one round of Lloyd's
algorithm needs only k binary searches and prefix sums, and no table of distances.

In one dimension the optimum can be computed too, by dynamic programming over intervals (Fisher 1958; Wang & Song 2011,
Ckmeans.1d.dp). The best last cut never moves to the left when values are added on the right. Divide and conquer uses
this to try fewer cuts (Grønlund et al. 2017, arXiv:1701.07204, sec. 2).
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Start = Literal["linear", "density", "random", "optimal"]
Array = NDArray[np.float64]

_MAX_POINTS = 4096
_MAX_ROUNDS = 1000


def kmeans(values: ArrayLike, num_clusters: int, start: Start = "linear", *, seed: int = 0) -> Array:
    """The centers in ascending order.

    There are ``num_clusters`` of them, or fewer if there are fewer different values. Lloyd's rounds follow after every
    start; they never increase the error.

    The start ``optimal`` gives the smallest possible error for up to 4096 different values. For more values, the cuts
    lie between 4096 bins. Let W be the squared error if each value is replaced by the mean of its bin. Then the root of
    the squared error is at most ``sqrt(W + (sqrt(optimum) + sqrt(W))^2)``.

    Args:
        values: finite numbers, at least one; an array of any shape.
        num_clusters: number of clusters k, 1 or more.
        start: first centers. ``linear`` takes k points at equal distances from the smallest value to the largest,
            ``density`` takes k quantiles at equal distances, ``random`` takes k of the values, and ``optimal`` takes
            the centers with the smallest error.
        seed: seed of the ``random`` start; any int of 0 or more.

    Raises:
        ValueError: if there are no values, if a value is not finite, or if ``num_clusters`` is below 1.
    """
    x = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    if num_clusters < 1:
        raise ValueError(f"num_clusters is {num_clusters}: choose 1 or more.")
    if not len(x) or not np.isfinite(x).all():
        raise ValueError("values are empty or hold NaN or infinity, so they have no clusters: look at the weights.")
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
    """The number of the nearest center of each value; if two centers are equally near, the larger number.

    Args:
        values: numbers to assign; an array of any shape, which the result has too.
        centers: centers ``[k]`` in ascending order.
    """
    return np.searchsorted(_cuts(centers), np.asarray(values, dtype=np.float64), side="right")


def squared_error(values: ArrayLike, centers: Array) -> float:
    """The sum of the squared distances from each value to its nearest center.

    Args:
        values: numbers to compare; an array of any shape.
        centers: centers ``[k]`` in ascending order.
    """
    x = np.asarray(values, dtype=np.float64)
    return float(((x - centers[assign(x, centers)]) ** 2).sum())


def _cuts(centers: Array) -> Array:
    """The borders of the clusters ``[k - 1]``: the middles between neighbouring centers."""
    return (centers[1:] + centers[:-1]) / 2


def _lloyd(x: Array, centers: Array) -> Array:
    """Move each center to the mean of its nearest values, until nothing changes. A center without values stays.

    ``x`` is sorted, so the values of center i are ``x[bounds[i]:bounds[i + 1]]``, and ``sums`` gives their sum.
    """
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
    """The centers ``[k]`` with the smallest error, or close to it; see :func:`kmeans`."""
    edges = different[1:]
    if len(different) > _MAX_POINTS:  # half of the edges in equal steps, for the tails; half by quantiles, for the rest
        half = _MAX_POINTS // 2
        edges = np.unique([*np.linspace(x[0], x[-1], half)[1:], *np.quantile(x, np.arange(1, half) / half)])
    bounds = np.unique(np.concatenate([[0], np.searchsorted(x, edges), [len(x)]]))
    centered = x - x.mean()  # small numbers, so that the differences of prefix sums of squares lose few digits
    count, total, squares = (np.concatenate([[0.0], np.cumsum(centered**power)])[bounds] for power in (0, 1, 2))
    cuts = bounds[_best_cuts(count, total, squares, num_clusters)]
    return np.diff(np.concatenate([[0.0], np.cumsum(x)])[cuts]) / np.diff(cuts)


def _best_cuts(count: Array, total: Array, squares: Array, num_clusters: int) -> NDArray[np.int64]:
    """The cuts of sorted points into ``num_clusters`` intervals with the least squared error.

    The result holds ``num_clusters + 1`` indices, from 0 to the number of points.

    The recurrence is ``better[stop] = min over cut of (least[cut] + cost(cut, stop))``. Here ``least[cut]`` is the
    smallest error of the first ``cut`` points in one interval fewer. The best cut never falls when ``stop`` grows. So
    the best cuts of two solved stops bound the best cut of every stop between them, and few cuts must be tried. All
    stops of one level of this divide and conquer are solved at once, as arrays.

    Args:
        count: prefix sums of the number of values, ``[points + 1]``, beginning with 0.
        total: prefix sums of the values, ``[points + 1]``, beginning with 0.
        squares: prefix sums of the squared values, ``[points + 1]``, beginning with 0.
        num_clusters: number of intervals, 1 up to the number of points.
    """

    def cost(start: NDArray[np.int64], stop: NDArray[np.int64]) -> Array:
        """The squared error of the points from ``start`` to ``stop`` around their mean."""
        mass = total[stop] - total[start]
        return np.maximum(squares[stop] - squares[start] - mass * mass / (count[stop] - count[start]), 0)

    num_points = len(count) - 1
    everything = np.arange(1, num_points + 1)
    least = np.concatenate([[0.0], cost(np.zeros_like(everything), everything)])  # the first points in one interval
    cut_at = []  # for each number of intervals, the best last cut by stop
    for used in range(1, num_clusters):
        cut = np.zeros(num_points + 1, dtype=np.int64)
        better = np.full(num_points + 1, np.inf)
        stops = np.arange(used + 1, num_points + 1)
        stride = 1 << len(stops).bit_length()
        while stride := stride // 2:  # first the middle stop, then the quarters, then the eighths, and so on
            at = np.arange(stride - 1, len(stops), 2 * stride)
            stop = stops[at]
            # The solved neighbours at distance ``stride`` bound the cuts to try; at the ends any cut is possible.
            low = np.where(at >= stride, cut[stops[np.maximum(at - stride, 0)]], used)
            after = at + stride
            high = np.where(after < len(stops), cut[stops[np.minimum(after, len(stops) - 1)]], num_points)
            # The flat array ``tried`` holds the cuts to try of all stops; those of stop i begin at ``begins[i]``.
            num_tried = np.minimum(high, stop - 1) - low + 1
            begins = np.cumsum(num_tried) - num_tried
            tried = np.arange(num_tried.sum()) - np.repeat(begins - low, num_tried)
            errors = least[tried] + cost(tried, np.repeat(stop, num_tried))
            best = np.minimum.reduceat(errors, begins)
            # Of equally good cuts of a stop, take the first one: the first hit at or after ``begins``.
            hits = np.flatnonzero(errors == np.repeat(best, num_tried))
            cut[stop], better[stop] = tried[hits[np.searchsorted(hits, begins)]], best
        least = better
        cut_at.append(cut)
    cuts = [num_points]  # from the last cut back to the first
    for cut in reversed(cut_at):
        cuts.append(int(cut[cuts[-1]]))
    return np.array([0, *reversed(cuts)])
