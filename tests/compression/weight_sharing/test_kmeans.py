"""K-means on a line: rounds only help, the optimum is one, and scikit-learn finds nothing better."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from project.compression.weight_sharing.kmeans import Start, assign, kmeans, squared_error

STARTS = get_args(Start)


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).laplace(size=count)


def least_error(values: np.ndarray, num_clusters: int) -> float:
    """By dynamic programming over all cuts, from the definition."""
    x = np.sort(values)
    cost = [[((x[i:j] - x[i:j].mean()) ** 2).sum() if j > i else 0.0 for j in range(len(x) + 1)] for i in range(len(x))]
    least = np.array(cost[0])
    for _ in range(num_clusters - 1):
        least = np.array(
            [min(least[i] + (cost[i][j] if i < j else 0.0) for i in range(max(j, 1))) for j in range(len(x) + 1)]
        )
    return float(least[-1])


@pytest.mark.parametrize(("count", "num_clusters"), [(9, 1), (10, 2), (40, 5), (60, 16), (33, 32)])
def test_the_optimum_is_that_of_all_cuts(count, num_clusters):
    values = numbers(count)
    found = squared_error(values, kmeans(values, num_clusters, "optimal"))
    assert found == pytest.approx(least_error(values, num_clusters), rel=1e-9, abs=1e-12)


def test_the_optimum_counts_equal_values():
    values = np.repeat(numbers(12), np.arange(1, 13))
    assert squared_error(values, kmeans(values, 4, "optimal")) == pytest.approx(least_error(values, 4), rel=1e-9)


@pytest.mark.parametrize("num_clusters", [2, 8, 32])
def test_the_optimum_beats_every_other_start_and_scikit_learn(num_clusters):
    values = numbers(3000)
    errors = {start: squared_error(values, kmeans(values, num_clusters, start)) for start in STARTS}
    theirs = KMeans(num_clusters, n_init=3, random_state=0).fit(values[:, None]).inertia_
    assert errors["optimal"] <= min(*errors.values(), theirs) * (1 + 1e-9)
    assert errors["optimal"] > 0


def test_from_the_same_start_it_goes_where_scikit_learn_goes():
    values = numbers(3000)
    start = np.linspace(values.min(), values.max(), 8)
    theirs = KMeans(8, init=start[:, None], n_init=1, tol=0, max_iter=1000).fit(values[:, None])
    assert np.allclose(kmeans(values, 8, "linear"), np.sort(theirs.cluster_centers_[:, 0]))


@pytest.mark.parametrize("num_clusters", [4, 64])
def test_bins_cost_next_to_nothing(num_clusters, monkeypatch):
    """Of 10,000 values 4096 bins against all of them."""
    values = numbers(10_000, seed=1)
    rough = squared_error(values, kmeans(values, num_clusters, "optimal"))
    monkeypatch.setattr("project.compression.weight_sharing.kmeans._MAX_POINTS", 10_000)
    exact = squared_error(values, kmeans(values, num_clusters, "optimal"))
    assert exact * (1 - 1e-9) <= rough <= 1.01 * exact


@pytest.mark.parametrize("start", ["linear", "density", "random"])
@pytest.mark.parametrize("num_clusters", [3, 16])
def test_rounds_never_make_the_error_larger(start, num_clusters, monkeypatch):
    values, errors = numbers(2000), []
    for rounds in range(1, 40):
        monkeypatch.setattr("project.compression.weight_sharing.kmeans._MAX_ROUNDS", rounds)
        errors.append(squared_error(values, kmeans(values, num_clusters, start)))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("start", STARTS)
def test_each_value_goes_to_the_nearest_center(start):
    values = numbers(500).reshape(20, 25)
    centers = kmeans(values, 7, start)
    distances = np.abs(values[..., None] - centers)
    assert len(centers) == 7 and (np.diff(centers) > 0).all()
    assert (np.take_along_axis(distances, assign(values, centers)[..., None], -1)[..., 0] == distances.min(-1)).all()


@pytest.mark.parametrize("start", STARTS)
def test_few_values_are_their_own_centers(start):
    pixels = load_digits().data[:20]  # whole numbers, 0 to 16
    centers = kmeans(pixels, 32, start)
    assert (centers == np.unique(pixels)).all() and squared_error(pixels, centers) == 0


def test_random_is_the_seeds():
    values = numbers(300)
    assert (kmeans(values, 9, "random", seed=3) == kmeans(values, 9, "random", seed=3)).all()
    assert (kmeans(values, 9, "random", seed=3) != kmeans(values, 9, "random", seed=4)).any()


def test_what_can_not_be_clustered_is_refused():
    with pytest.raises(ValueError, match="num_clusters is 0"):
        kmeans([1.0], 0)
    for values in ([], [1.0, np.nan], [np.inf]):
        with pytest.raises(ValueError, match="look at the weights"):
            kmeans(values, 2)
