"""A schedule goes on at its share of the run, whatever changes the number of steps; or the resume is refused."""

import csv
import itertools

import pytest

from project.frame.paths import Run

DIGITS = ["--data.batch_size=120", "--trainer.max_epochs=4"]  # 10 steps an epoch
LR = "--model.optimizer.lr=0.1"
SCHEDULES = {
    "Linear": ["--model.schedule=project.learning.Linear", "--model.schedule.warmup_epochs=1"],
    "Cosine": ["--model.schedule=project.learning.Cosine", "--model.schedule.warmup_epochs=1"],
    "Steps": ["--model.schedule=project.learning.Steps", "--model.schedule.milestones=[1.5, 3]"],
    "Schedule": ["--model.schedule=project.learning.Schedule", "--model.schedule.warmup_epochs=1.5"],
}
CHANGES = {
    "twice the batch": ["--data.batch_size=240"],
    "half the batch": ["--data.batch_size=60"],
    "accumulation": ["--trainer.accumulate_grad_batches=2"],
    "fewer batches": ["--trainer.limit_train_batches=5"],
}


def rates(run):
    """The rate at each step that has been logged."""
    rows = list(csv.DictReader(run.metrics.read_text().splitlines()))
    key = next(name for name in rows[0] if name.startswith("lr-"))
    return [float(row[key]) for row in rows if row[key]]


@pytest.fixture
def options(digits):
    monitor = ["--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"]
    return [*digits, *DIGITS, *monitor, "--trainer.test_after_fit=false", "--model.optimizer=torch.optim.SGD", LR]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_goes_on_at_its_share(schedule, change, stop, command, options, logs):
    check(schedule, change, stop, command, options, logs)


def test_a_larger_batch_goes_on_half_way(command, options, logs):
    check("Linear", "twice the batch", 2, command, options, logs)


def check(schedule, change, stop, command, options, logs):
    options = [*options, *SCHEDULES[schedule]]
    until = ["--trainer.callbacks+=helpers.stop_after.StopAfter", f"--trainer.callbacks.epochs={stop}"]
    assert command("fit", *options, *CHANGES[change], "--trainer.experiment=whole")[0] == 0
    assert command("fit", *options, *until, "--trainer.experiment=part")[0] == 0
    resume = ["--trainer.callbacks.StopAfter.epochs=99", *CHANGES[change]]
    status, _, err = command("fit", "--resume", str(logs / "part"), *resume)
    assert status == 0, err
    intended, found = (rates(Run.find(logs / name)) for name in ("whole", "part"))
    rest = len(intended) * (4 - stop) // 4
    intended, found = intended[-rest:], found[-rest:]
    assert rest > 3
    step = max(abs(a - b) for a, b in itertools.pairwise(intended)) + 1e-9
    assert all(abs(a - b) <= step for a, b in zip(intended, found, strict=True))


@pytest.mark.parametrize("change", [["--trainer.max_epochs=6"], ["--data.batch_size=60"]], ids=["length", "batch"])
def test_one_cycle_is_refused(change, command, options, logs):
    schedule = ["--model.schedule=project.learning.OneCycle", "--trainer.max_epochs=2"]
    assert command("fit", *options, *schedule)[0] == 0
    status, _, err = command("fit", "--resume", str(logs / "digits"), *change)
    assert status == 2 and "OneCycle was made for 20 steps" in err and err.count("\n") == 1
