"""Laws of the observers: what a range covers, and which error it minimises."""

import numpy as np
import pytest

from project.compression.ranges import Observer, Scale, to_integers, weight_scales


def observe(values: np.ndarray, batches: int = 4) -> Observer:
    observer = Observer()
    for batch in np.array_split(values, batches):
        observer.see_range(batch)
    for batch in np.array_split(values, batches):
        observer.count(batch)
    return observer


def error(scale: Scale, values: np.ndarray) -> float:
    return float(((scale.fake(values.astype(np.float64)) - values) ** 2).mean())


@pytest.fixture
def values() -> np.ndarray:
    """Mostly small, with a few outliers, as activations are."""
    random = np.random.default_rng(0)
    return np.concatenate([random.laplace(0.5, 1, 50_000), [40.0, -25.0]]).astype(np.float32)


def test_min_max_clips_nothing(values: np.ndarray) -> None:
    scale = observe(values).scale("min-max")
    assert np.abs(scale.fake(values.astype(np.float64)) - values).max() <= 0.51 * scale.scale


def test_mean_min_max_is_the_mean_of_each_images_extremes_however_they_are_batched() -> None:
    """Ten images whose largest value is 1 to 10 and smallest -1 to -10: the mean is 5.5, and batches do not matter."""
    images = np.zeros((10, 3, 4), np.float32)
    images[:, 0, 0], images[:, 2, 1] = np.arange(1, 11), -np.arange(1, 11)
    scales = [observe(images, batches).scale("mean-min-max") for batches in (1, 4, 10)]
    assert scales == [Scale.of_range(-5.5, 5.5)] * 3


def test_mse_has_the_smallest_error_of_all_shrunk_ranges(values: np.ndarray) -> None:
    observer = observe(values)
    best = error(observer.scale("mse"), values)
    assert best < 0.95 * error(observer.scale("min-max"), values)
    tried = [error(Scale.of_range(values.min() * f, values.max() * f), values) for f in np.linspace(0.01, 1, 400)]
    assert best <= 1.02 * min(tried)


def test_percentile_keeps_its_share(values: np.ndarray) -> None:
    scale = observe(values).scale("percentile", 99)
    low, high = -scale.zero_point * scale.scale, (255 - scale.zero_point) * scale.scale
    inside = ((values >= low - scale.scale) & (values <= high + scale.scale)).mean()
    assert 0.985 <= inside <= 0.995


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 3.0), (-2.0, -1.0), (1.0, 2.0), (0.0, 0.0)])
def test_zero_is_exact_whatever_the_range(low: float, high: float) -> None:
    scale = Scale.of_range(low, high)
    assert scale.fake(np.zeros(1)) == 0 and 0 <= scale.zero_point <= 255


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_weights_come_back_within_half_a_step(num_bits: int) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 5, 3, 3)).astype(np.float32)
    weight[2] = 0
    scales = weight_scales(weight, num_bits)
    integers = to_integers(weight, scales, num_bits)
    back = integers * scales.reshape(-1, 1, 1, 1)
    assert (np.abs(back - weight) <= 0.501 * scales.reshape(-1, 1, 1, 1)).all()
    assert np.abs(integers).max() == 2 ** (num_bits - 1) - 1 and not integers[2].any()


def test_clipping_for_the_squared_error_never_loses_to_the_whole_range() -> None:
    weight = np.random.default_rng(0).laplace(size=(16, 200)).astype(np.float32)

    def squared(method: str) -> np.ndarray:
        scales = weight_scales(weight, 4, method)  # type: ignore[arg-type]
        return ((to_integers(weight, scales, 4) * scales[:, None] - weight) ** 2).sum(1)

    assert (squared("mse") <= squared("min-max") * 1.0001).all()
    assert squared("mse").sum() < 0.9 * squared("min-max").sum()
