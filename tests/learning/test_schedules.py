"""Schedules: their factors at the ends, against torch's own, and in training steps."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, PolynomialLR

from project.learning.schedules import Cosine, Linear, OneCycle, Plateau, Schedule, Steps


def rates(schedule: Schedule, total: int, per_epoch: float, lr: float = 1.0, lr_scale: float = 1.0) -> list[float]:
    """The rate of each step of a run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = schedule.build(optimizer, total, per_epoch, lr_scale)["scheduler"]
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_a_constant_rate_stays():
    assert rates(Schedule(), 20, 10, lr=0.3) == [0.3] * 20


def test_cosine_is_torchs_cosine():
    """So the last step still trains. The rate is 0 after it."""
    for total in (1, 2, 5, 50):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = CosineAnnealingLR(optimizer, T_max=total)
        expected = []
        for _ in range(total):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
        assert rates(Cosine(), total, 10) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "theirs", "shift"),
    [
        (Linear(), lambda optimizer: PolynomialLR(optimizer, total_iters=30, power=1.0), 0),
        (Steps([1, 2.5], gamma=0.2), lambda optimizer: MultiStepLR(optimizer, [10, 25], gamma=0.2), 0),
        # Our first step has a rate above 0 also if the start is 0.
        (Schedule(2, warmup_start=0.25), lambda optimizer: LinearLR(optimizer, 0.25, total_iters=20), 1),
        (Schedule(2, warmup_start=0.0), lambda optimizer: LinearLR(optimizer, 1e-12, total_iters=20), 1),
    ],
)
def test_each_is_torchs(schedule: Schedule, theirs: Callable[..., LRScheduler], shift: int):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, expected = theirs(optimizer), []
    for _ in range(30 + shift):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(schedule, 30, 10) == pytest.approx(expected[shift:], abs=1e-9)


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_steps_after_the_end_have_the_last_rate(kind: type[Cosine]):
    """A round of pruning that goes back to a step within an epoch has more steps than are left of the schedule."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = kind(warmup_epochs=1).build(optimizer, 30, 10, first_step=5)["scheduler"].lr_lambdas[0]
    assert factor(0) < factor(4) == 1.0 and factor(23) > factor(24) > 0
    assert [factor(step) for step in range(25, 30)] == [factor(24)] * 5


def test_every_step_of_a_run_trains():
    assert rates(Linear(), 5, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(Linear(warmup_epochs=1), 6, 3) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    for total in (1, 2, 3, 10):
        for warmup in (0, 0.5, 1, 1.5, 2, 10):
            for kind in (Schedule, Cosine, Linear):
                assert min(rates(kind(warmup_epochs=warmup), total, 1)) > 0
        for fraction in (0.1, 0.3, 0.5, 0.9):
            found = rates(OneCycle(warmup_fraction=fraction), total, 1)
            assert min(found) > 0 and found[0] >= 0.04


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_decays_end_where_they_should_and_never_rise(kind):
    found = rates(kind(final=0.1), 101, 10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = kind(final=0.1).build(optimizer, 101, 10)["scheduler"].lr_lambdas[0]
    assert factor(101) == factor(100) and 0.1 < found[-1] < 0.11
    assert kind(final=0.1).decay(1.0, 10.1) == pytest.approx(0.1) and kind(final=0.1).decay(0.0, 0.1) == 1.0
    assert all(a >= b for a, b in pairwise(found))


def test_warmup_rises_linearly_to_the_full_rate():
    found = rates(Linear(warmup_epochs=2), 100, 10)
    assert found[:19] == pytest.approx([(step + 1) / 20 for step in range(19)])
    assert found[19] == pytest.approx(1.0)
    assert found[19:] == pytest.approx([1 - step / 81 for step in range(81)])


def test_warmup_of_a_scaled_rate_starts_from_the_unscaled_one():
    """Goyal et al. 2017, sec. 2.2: from eta to k eta."""
    found = rates(Schedule(warmup_epochs=5), 100, 10, lr=0.8, lr_scale=8)
    assert found[0] == pytest.approx(0.1 + 0.7 / 50)
    assert found[50:] == [0.8] * 50


def test_steps_fall_at_their_milestones():
    found = rates(Steps([3, 6], gamma=0.1), 90, 10)
    assert found[29] == 1.0 and found[30] == pytest.approx(0.1)
    assert found[59] == pytest.approx(0.1) and found[60] == pytest.approx(0.01)


def test_one_cycle_peaks_at_the_optimizers_rate():
    found = rates(OneCycle(warmup_fraction=0.25, start_factor=0.1, final_factor=0.01), 100, 10, lr=0.5)
    assert found[0] == pytest.approx(0.05) and max(found) == pytest.approx(0.5) and found[-1] == pytest.approx(0.005)
    assert found.index(max(found)) == 24


def test_plateau_lowers_the_rate_after_its_patience():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    built = Plateau("val/accuracy", factor=0.5, patience=1).build(optimizer, 100, 10)
    assert built["monitor"] == "val/accuracy" and built["interval"] == "epoch"
    found = []
    for accuracy in (0.5, 0.6, 0.6, 0.6, 0.7):
        built["scheduler"].step(accuracy)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == [1.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Cosine(warmup_epochs=-1), "warmup_epochs is -1"),
        (lambda: Cosine(final=2), "final is 2"),
        (lambda: Schedule(warmup_start=1.5), "warmup_start is 1.5"),
        (lambda: Steps([5, 3]), "milestones"),
        (lambda: Steps([3], gamma=0), "gamma is 0"),
        (lambda: OneCycle(warmup_fraction=0), "warmup_fraction is 0"),
        (lambda: Plateau(factor=1.0), "factor is 1.0"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_factor_is_finite_when_the_warmup_is_the_whole_run():
    assert all(math.isfinite(rate) for rate in rates(Cosine(warmup_epochs=10), 20, 10))


class TillTheEnd(Schedule):
    """A schedule of a user, whose rate depends on the end of the run."""

    def decay(self, progress: float, epoch: float) -> float:
        return 1 - progress**2


@pytest.mark.parametrize("schedule", [Cosine(), Linear(warmup_epochs=1), OneCycle(), TillTheEnd()])
def test_a_schedule_that_needs_an_end_is_refused_without_one(schedule):
    with pytest.raises(ValueError, match=f"the schedule {type(schedule).__name__} needs the length of the run"):
        schedule.build(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), math.inf, 10)


def test_the_others_work_without_an_end():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = Schedule(warmup_epochs=2).build(optimizer, math.inf, 10)["scheduler"].lr_lambdas[0]
    assert [warm(step) for step in (0, 9, 19, 10**6)] == pytest.approx([0.05, 0.5, 1.0, 1.0])
    steps = Steps([3], gamma=0.1).build(optimizer, math.inf, 10)["scheduler"].lr_lambdas[0]
    assert [steps(step) for step in (29, 30, 10**6)] == pytest.approx([1.0, 0.1, 0.1])
    Plateau().build(optimizer, math.inf, 10)
