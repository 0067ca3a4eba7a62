"""How long inference takes, and which engine (:mod:`project.deployment.engines`) is the fastest.

A machine's speed drifts, from heat, clock and neighbours, so engines that shall be compared are measured in one call of
:func:`measure`: it runs all of them in every round, in an order drawn anew, and drift hits all alike. Reported is the
median over the rounds with the 5th and the 95th percentile.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from project.deployment.engines import Engine

PAUSE_S = 0.02
"""Rest before an engine's turn when there are several threads: those of the engine before spin for a while (OpenMP's
for milliseconds), and would take the cores from the next one."""
SETTLE_S = 0.04
"""Then untimed calls for so long: threads that wake up on one core are moved apart only after milliseconds. With two
threads, ONNX Runtime's int8 took 3.8 or 11 ms for a batch after the rest and a single call, and 3.7 ms when settled."""


@dataclass(frozen=True)
class Latency:
    """Duration of one forward pass of one batch.

    Args:
        median_ms: median over the rounds.
        p05_ms, p95_ms: 5th and 95th percentile over the rounds.
        num_rounds: number of timed calls.
        num_threads: threads an engine may use.
    """

    median_ms: float
    p05_ms: float
    p95_ms: float
    num_rounds: int
    num_threads: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Latency":
        """Median and percentiles (linear between samples) of timed calls, with the present number of threads."""
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

    Each timed call follows an untimed one of the same engine and batch size, since another has used the caches last;
    with several threads it follows untimed ones for :data:`SETTLE_S`.

    Args:
        engines: by name, of one net or of several to compare.
        image_shape: (C, H, W).
        batch_sizes: numbers of images per call.
        rounds: timed calls of each engine at each batch size.
        budget_s: seconds after which no new round begins (there is always one), the warm-up not counted; ``None`` runs
            all rounds.
        warm_up: untimed calls of each engine at each batch size before the first round, at least one; compilation
            happens here.
        seed: of the images (standard normal) and of the order in each round.

    Returns:
        Latencies by (name, batch size).

    Raises:
        ValueError: when nothing is to be measured.
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
    """The engine with the smallest median, by batch size; of the dense fp32 net's engines: the baseline to beat."""
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
            raise ValueError(f"{name} is {value}, but it is a count: choose at least 1.")
