"""Laws of the observers: what a range covers, and which error it minimises."""

import numpy as np
import pytest
import torch

from project.deployment.int8.observers import Observer, Scale, round_weight


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


RANGES = [(0.0, 6.0), (-1.0, 3.0), (-2.0, -1.0), (1.0, 2.0), (0.0, 0.0), (-1.0, 1.0), (-0.001, 2.0), (-2.0, 0.001)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_zero_is_exact_whatever_the_range(low: float, high: float) -> None:
    scale = Scale.of_range(low, high)
    assert scale.fake(np.zeros(1)) == 0 and 0 <= scale.zero_point <= 255


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_both_ends_are_reached_with_the_smallest_scale(low: float, high: float) -> None:
    scale, ends = Scale.of_range(low, high), np.array([min(low, 0), max(high, 0)], np.float64)
    reached = np.array([-scale.zero_point, 255 - scale.zero_point]) * scale.scale
    assert (reached[0] <= ends[0] + 1e-6 * scale.scale) and (reached[1] >= ends[1] - 1e-6 * (ends[1] - ends[0]))
    assert scale.scale <= (ends[1] - ends[0]) / 254 + 1e-12


def test_pixels_do_not_lie_between_two_integers() -> None:
    """Pixels from 0 to 255, normalised with mean and standard deviation 0.5: engines round such ties differently."""
    pixels = (np.arange(256) / 255 - 0.5) / 0.5
    scale = Scale.of_range(-1.0, 1.0)
    between = np.abs((pixels / scale.scale) % 1 - 0.5)
    assert (between < 0.02).mean() < 0.1 and np.abs(scale.fake(pixels) - pixels).max() < 0.5001 * scale.scale


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_weights_come_back_within_half_a_step(num_bits: int) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    integers, scales = round_weight(weight, num_bits)
    steps = scales.view(-1, 1, 1, 1)
    assert ((integers * steps - weight).abs() <= 0.501 * steps).all()
    assert integers.dtype == torch.int8 and integers.abs().max() == 2 ** (num_bits - 1) - 1 and not integers[2].any()


def test_clipping_for_the_squared_error_never_loses_to_the_whole_range() -> None:
    weight = torch.distributions.Laplace(0.0, 1.0).sample((16, 200))
    for num_bits, reduce_range in ((4, False), (8, True)):

        def squared(method: str, bits: int = num_bits, reduce: bool = reduce_range) -> torch.Tensor:
            integers, scales = round_weight(weight, bits, method, reduce_range=reduce)  # type: ignore[arg-type]
            return (integers * scales[:, None] - weight).square().sum(1)

        assert (squared("mse") <= squared("min-max") * 1.0001).all()
    assert squared("mse", 4, False).sum() < 0.9 * squared("min-max", 4, False).sum()


@pytest.mark.parametrize("method", ["min-max", "mse"])
@pytest.mark.parametrize(
    "kind", ["normal", "equal", "one large", "two large", "two of other signs", "ties", "a single one"]
)
def test_reduced_no_two_weights_of_a_sign_overflow_sixteen_bits(kind: str, method: str) -> None:
    """255 times the sum of any two weights of one sign fits into 16 bits: a kernel may pair them as it likes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 37, generator=generator)
    if kind == "equal":
        rows = rows.sign() * rows[:, :1].abs()
    elif kind in ("one large", "two large"):
        rows[:, : 1 + (kind == "two large")] *= 40
        rows[:, :2] = rows[:, :2].abs()
    elif kind == "two of other signs":
        rows[:, :2] = torch.tensor([100.0, -100.0])
    elif kind == "ties":  # the two largest end at half an integer each
        rows = rows.clamp(-1, 1) * 0.3 + 0.1
        halves = torch.randint(40, 63, (500,), generator=generator) + 0.5
        rows[:, 0], rows[:, 1] = halves, 128 - halves
    elif kind == "a single one":
        rows = rows[:, :1]
    integers, scales = round_weight(rows, 8, method, reduce_range=True)  # type: ignore[arg-type]
    ordered = integers.to(torch.int32).sort(1).values
    sums = torch.stack([ordered[:, -2:].clamp(min=0).sum(1), -ordered[:, :2].clamp(max=0).sum(1)])
    assert sums.max() * 255 <= 2**15 - 1
    if method == "min-max":  # and no bit more is given away than has to be: the pair or the largest one is at its end
        assert (torch.maximum(sums.amax(0) / 128, integers.abs().amax(1) / 127) > 0.98).all()
        assert ((integers * scales[:, None] - rows).abs() <= 0.501 * scales[:, None]).all()


def test_reduced_or_not_four_bits_are_the_same() -> None:
    weight = torch.randn(8, 30, generator=torch.Generator().manual_seed(0))
    for ours, other in zip(round_weight(weight, 4), round_weight(weight, 4, reduce_range=True), strict=True):
        assert torch.equal(ours, other)


def test_no_scale_is_below_the_smallest_allowed() -> None:
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    for method in ("min-max", "mse"):
        _, free = round_weight(weight, 8, method)  # type: ignore[arg-type]
        integers, scales = round_weight(weight, 8, method, smallest=torch.full((4,), 0.5))  # type: ignore[arg-type]
        assert free[1] < 1e-10 and (scales >= 0.5).all() and not integers[1].any()
