import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from project.deployment.latency import Latency, best, measure

SHAPE = (2, 6, 6)


def sleeper(duration_ms: float) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        time.sleep(duration_ms / 1000 * len(images))
        return images

    return run


def test_measured_is_the_duration_of_one_call() -> None:
    measured = measure({"slow": sleeper(8), "fast": sleeper(2)}, SHAPE, batch_sizes=(1, 3), rounds=7)
    assert set(measured) == {("slow", 1), ("slow", 3), ("fast", 1), ("fast", 3)}
    for (name, batch), found in measured.items():
        expected = {"slow": 8, "fast": 2}[name] * batch
        assert expected <= found.p05_ms <= found.median_ms <= found.p95_ms
        assert found.num_rounds == 7 and found.num_threads == torch.get_num_threads()
    assert best(measured) == {1: "fast", 3: "fast"}


def test_a_round_is_one_call() -> None:
    """Not two: the time of a call that counts, by a clock of its own, is what is measured."""
    durations: list[float] = []

    def slow(images: Tensor) -> Tensor:
        begin = time.perf_counter()
        time.sleep(0.008)
        durations.append(1e3 * (time.perf_counter() - begin))
        return images

    found = measure({"slow": slow}, SHAPE, batch_sizes=(1,), rounds=9, warm_up=1)[("slow", 1)]
    timed = durations[2::2]  # after the warm-up, each timed call follows an untimed one
    assert len(timed) == 9
    assert sorted(timed)[4] <= found.median_ms < 1.5 * sorted(timed)[4]


def test_rounds_interleave_all_engines_in_changing_order() -> None:
    calls: list[tuple[str, int]] = []

    def spy(name: str) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            assert images.shape[1:] == SHAPE and images.dtype == torch.float32 and images.is_contiguous()
            calls.append((name, len(images)))
            return images

        return run

    random_state = torch.get_rng_state()
    measure({name: spy(name) for name in "abc"}, SHAPE, batch_sizes=(1, 2), rounds=10, warm_up=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    warm_up, rounds = calls[: 2 * 6], calls[2 * 6 :]
    everyone = {(name, batch) for name in "abc" for batch in (1, 2)}
    assert set(warm_up) == everyone
    assert rounds[::2] == rounds[1::2]  # an untimed call of the same engine and size before each timed one
    orders = [tuple(rounds[start : start + 12 : 2]) for start in range(0, 120, 12)]
    assert all(set(order) == everyone for order in orders)
    assert len(set(orders)) > 5


def test_budget_ends_the_rounds_but_for_the_first() -> None:
    engines = {"a": sleeper(5)}
    assert measure(engines, SHAPE, batch_sizes=(1,), rounds=9, budget_s=0.0, warm_up=1)["a", 1].num_rounds == 1
    assert 1 < measure(engines, SHAPE, batch_sizes=(1,), rounds=500, budget_s=0.2)["a", 1].num_rounds < 100


def test_percentiles_equal_the_hand_calculation() -> None:
    found = Latency.of([float(value) for value in reversed(range(101))])
    assert (found.median_ms, found.p05_ms, found.p95_ms, found.num_rounds) == pytest.approx((50, 5, 95, 101))
    assert Latency.of([1.0, 2.0]).median_ms == 1.5


def test_best_is_taken_for_each_batch_size() -> None:
    def found(median_ms: float) -> Latency:
        return Latency(median_ms, 0.1, 99, 5, 1)

    latencies = {("a", 1): found(1), ("b", 1): found(2), ("a", 64): found(30), ("b", 64): found(20)}
    assert best(latencies) == {1: "a", 64: "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"warm_up": 0}, "warm_up is 0"),
        ({"batch_sizes": (1, 0)}, "batch size 0 is 0"),
        ({"batch_sizes": ()}, "nothing to measure"),
    ],
)
def test_nothing_to_measure_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure({"a": sleeper(0)}, SHAPE, **options)
