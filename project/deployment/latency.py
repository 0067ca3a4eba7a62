"""How long inference takes, and which engine (:mod:`project.deployment.engines`) is the fastest.

The speed of a machine drifts with its temperature, its clock and the load of other programs. So compare engines in one
call of :func:`measure`. It runs all of them in every round, in a new random order, and drift affects all of them alike.
The result is the median over the rounds, with the 5th and the 95th percentile.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from project.deployment.engines import Engine

PAUSE_S = 0.02
"""Seconds of rest before each engine if there are several threads. The threads of the previous engine still spin for a
while (OpenMP's for milliseconds). Without the rest they would take the cores from the next engine."""
SETTLE_S = 0.04
"""Seconds of untimed calls after the rest. Threads that wake up on the same core move to different cores only after
milliseconds. With two threads, ONNX Runtime's int8 took 3.8 or 11 ms for a batch after the rest and a single call, and
3.7 ms after these calls."""


@dataclass(frozen=True)
class Latency:
    """Duration of one forward pass of one batch.

    Example::

        >>> from project.deployment import Latency
        >>> latency = Latency.of([1.0, 1.1, 1.2, 1.1, 5.0])
        >>> latency.median_ms, latency.num_rounds
        (1.1, 5)

    Args:
        median_ms: median over the rounds, in milliseconds; above 0.
        p05_ms: 5th percentile over the rounds, in milliseconds; above 0.
        p95_ms: 95th percentile over the rounds, in milliseconds; above 0.
        num_rounds: number of timed calls; 1 or more.
        num_threads: number of threads that an engine may use; 1 or more.
    """

    median_ms: float
    p05_ms: float
    p95_ms: float
    num_rounds: int
    num_threads: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Latency":
        """Median and percentiles of timed calls. Percentiles are interpolated linearly between samples.

        The number of threads is the one that PyTorch uses now.

        Args:
            samples_ms: duration of each timed call, in milliseconds; at least one.
        """
        quantiles = torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64)
        median, p05, p95 = torch.tensor(samples_ms, dtype=torch.float64).quantile(quantiles).tolist()
        return cls(median, p05, p95, len(samples_ms), torch.get_num_threads())


def measure(
    engines: Mapping[str, Engine],
    image_shape: tuple[int, int, int],
    *,
    batch_sizes: Sequence[int] = (1, 64),
    rounds: int = 50,
    budget_s: float | None = None,
    warm_up: int = 3,
    seed: int = 0,
) -> dict[tuple[str, int], Latency]:
    """Time every engine at every batch size, in interleaved rounds.

    Another engine used the caches last. So an untimed call of the same engine and batch size precedes each timed call.
    With several threads, untimed calls run for :data:`SETTLE_S` before it.

    Args:
        engines: engines to compare, by name. They may run the same net or several.
        image_shape: shape (C, H, W) of one image.
        batch_sizes: numbers of images in one call; each 1 or more.
        rounds: number of timed calls of each engine at each batch size; 1 or more.
        budget_s: seconds after which no new round begins; 0 or more. The warm-up does not count, and there is always
            one round. ``None`` runs all rounds.
        warm_up: number of untimed calls of each engine at each batch size before the first round; 1 or more.
            Compilation happens in them.
        seed: seed of the images (standard normal) and of the order in each round; any int.

    Returns:
        Latencies by (name, batch size).

    Raises:
        ValueError: if a number is below 1, or there is no engine or no batch size.
    """
    _check_positive(rounds=rounds, warm_up=warm_up, **{f"batch size {batch}": batch for batch in batch_sizes})
    generator = torch.Generator().manual_seed(seed)
    images = {batch: torch.randn(batch, *image_shape, generator=generator) for batch in batch_sizes}
    slots = [(name, batch) for batch in batch_sizes for name in engines]
    if not slots:
        raise ValueError("engines or batch_sizes is empty, so there is nothing to measure: give at least one of each.")
    for name, batch in slots:
        for _ in range(warm_up):
            engines[name](images[batch])

    samples_ms: dict[tuple[str, int], list[float]] = {slot: [] for slot in slots}
    order, start = random.Random(seed), time.perf_counter()
    for _ in range(rounds):
        for name, batch in order.sample(slots, len(slots)):
            samples_ms[name, batch].append(_time_ms(engines[name], images[batch]))
        if budget_s is not None and time.perf_counter() - start >= budget_s:
            break
    return {slot: Latency.of(samples_ms[slot]) for slot in slots}


def best(latencies: Mapping[tuple[str, int], Latency]) -> dict[int, str]:
    """The name of the engine with the smallest median, for each batch size.

    Given the engines of the dense fp32 net, it is the baseline that a compressed net has to beat.

    Args:
        latencies: latencies by (name, batch size), as :func:`measure` returns them.
    """
    fastest: dict[int, str] = {}
    for name, batch in sorted(latencies, key=lambda slot: latencies[slot].median_ms):
        fastest.setdefault(batch, name)
    return fastest


def _time_ms(engine: Engine, images: Tensor) -> float:
    if torch.get_num_threads() > 1:
        time.sleep(PAUSE_S)
        settled = time.perf_counter() + SETTLE_S
        while time.perf_counter() < settled:
            engine(images)
    engine(images)
    start = time.perf_counter()
    engine(images)
    return 1000 * (time.perf_counter() - start)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: choose 1 or more.")
