"""Schedules: their factors at the ends, against torch's own, and in training steps."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

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


def test_cosine_is_torchs_cosine_one_step_ahead():
    """Ours ends at the final factor in the last step; torch's would get there in the step after it."""
    total = 50
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = CosineAnnealingLR(optimizer, T_max=total)
    expected = []
    for _ in range(total):
        optimizer.step()
        theirs.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(Cosine(), total, 10) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_decays_end_where_they_should_and_never_rise(kind):
    found = rates(kind(final=0.1), 100, 10)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(found))


def test_warmup_rises_linearly_to_the_full_rate():
    found = rates(Linear(warmup_epochs=2), 100, 10)
    assert found[:19] == pytest.approx([(step + 1) / 20 for step in range(19)])
    assert found[19] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.0)


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
