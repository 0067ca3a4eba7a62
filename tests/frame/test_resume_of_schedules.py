"""A schedule goes on at its share of the run, whatever changes the number of steps; or the resume is refused.

A run of 8 epochs of 10 steps is stopped at 1/4, 1/2 and 3/4, and goes on with another number of steps. Its rates are
compared with those of a run that had this number from the start.
"""

import csv
import shutil
from functools import cache

import pytest
import torch
from helpers.stop_after import StopAfter
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from project.data import Digits
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.learning import Cosine, Linear, OneCycle, Plateau, Schedule, Steps
from project.models import Classifier

EPOCHS, STOPS = 8, (2, 4, 6)
CHANGES = {
    "twice the batch": {"batch_size": 240},
    "half the batch": {"batch_size": 60},
    "accumulation": {"accumulate_grad_batches": 2},
    "fewer batches": {"limit_train_batches": 5},
    "longer": {"max_epochs": 12},
    "shorter": {"max_epochs": 7},
    "fewer steps": {"max_steps": 70},
    "longer and twice the batch": {"max_epochs": 16, "batch_size": 240},  # the same number of steps
}
SCHEDULES = {
    "Schedule": lambda: Schedule(warmup_epochs=2.5),
    "Linear": lambda: Linear(warmup_epochs=1),
    "Cosine": lambda: Cosine(warmup_epochs=3, final=0.1),
    "Steps": lambda: Steps([2, 4.5, 6]),
    "Plateau": lambda: Plateau(factor=0.5, patience=0),
    "OneCycle": lambda: OneCycle(),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Rates(Callback):
    """Records the rate of each step of the optimizer."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def fit(logs, schedule, callbacks=(), resume=None, base_batch_size=None, batch_size=120, ckpt_path=None, **options):
    """Train a linear net on 1,200 digits, with a rate so small that the loss does not fall. Returns the rates."""
    rates = Rates()
    torch.manual_seed(0)
    trainer = Trainer(
        logs_dir=str(logs),
        callbacks=[rates, *callbacks],
        accelerator="cpu",
        **{"max_epochs": EPOCHS, "test_after_fit": False, "observe": False, "enable_progress_bar": False, **options},
        num_sanity_val_steps=0,
        logger=False,
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model = Classifier(
        net,
        10,
        (1, 8, 8),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
        schedule=schedule,
        base_batch_size=base_batch_size,
    )
    data = Digits(batch_size=batch_size, val_fraction=237 / 1438, seed=0)
    trainer.fit(model, datamodule=data, resume=resume and str(resume), ckpt_path=ckpt_path and str(ckpt_path))
    return rates.seen


@cache
def stopped(folder, schedule, stop, base_batch_size=None):
    """The folder of a run that was stopped after ``stop`` epochs."""
    logs = folder / f"{schedule}_{stop}_{base_batch_size}"
    fit(logs, SCHEDULES[schedule](), [StopAfter(stop)], base_batch_size=base_batch_size)
    (logs / "default/version_0/config.yaml").write_text("{}\n")  # by which a run's folder is recognised
    return logs / "default/version_0"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(schedule, change, stop, folder, tmp_path, base_batch_size=None):
    resume = tmp_path / f"part_{stop}"
    shutil.copytree(stopped(folder, schedule, stop, base_batch_size), resume)
    options = {**CHANGES[change], "base_batch_size": base_batch_size}
    if schedule == "OneCycle":
        before = contents(resume)
        with pytest.raises(ValueError, match=r"OneCycle was made for 80 steps, 10 an epoch, and cannot continue"):
            fit(tmp_path, SCHEDULES[schedule](), resume=resume, **options)
        assert contents(resume) == before
        return
    intended = fit(tmp_path / "whole", SCHEDULES[schedule](), **options)
    found = fit(tmp_path, SCHEDULES[schedule](), resume=resume, **options)
    per_epoch = {"half the batch": 20, "longer": 10, "shorter": 10, "fewer steps": 10}.get(change, 5)
    assert len(found) >= 10 and len(intended) - len(found) == stop * per_epoch
    for index, rate in enumerate(found, len(intended) - len(found)):
        near = intended[index - 1 : index + 2]
        step = max(abs(near[1] - other) for other in near)
        assert abs(rate - near[1]) <= step + 1e-9 * rate, (index, rate, near)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("schedules")


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_goes_on_at_its_share(schedule, change, folder, tmp_path):
    """Each pair of a schedule and a change has one of the stops, so that each stop meets all schedules and changes."""
    stop = STOPS[([*SCHEDULES].index(schedule) + [*CHANGES].index(change)) % len(STOPS)]
    check(schedule, change, stop, folder, tmp_path)


@pytest.mark.parametrize(
    ("schedule", "change", "stop"),
    [
        ("Linear", "twice the batch", 4),
        ("Cosine", "longer", 2),
        ("Plateau", "half the batch", 6),
        ("OneCycle", "longer and twice the batch", 2),
    ],
)
def test_a_changed_run_goes_on_or_is_refused(schedule, change, stop, folder, tmp_path):
    check(schedule, change, stop, folder, tmp_path)


def test_a_run_that_max_steps_ends_goes_on_to_the_same_bits(tmp_path):
    """Lightning 2.6 would add an epoch without a batch to a resumed run, so that later epochs have other images."""
    fit(tmp_path / "whole", Linear(), max_steps=70)
    fit(tmp_path / "part", Linear(), [StopAfter(4)], max_steps=70)
    (tmp_path / "part/default/version_0/config.yaml").write_text("{}\n")
    fit(tmp_path / "part", Linear(), resume=tmp_path / "part/default/version_0", max_steps=70)
    runs = [Run(tmp_path / name / "default/version_0") for name in ("whole", "part")]
    whole, part = (torch.load(run.last_checkpoint, weights_only=True) for run in runs)
    assert whole["epoch"] == part["epoch"]
    assert all(torch.equal(value, part["state_dict"][key]) for key, value in whole["state_dict"].items())


@pytest.mark.parametrize("schedule", ["Linear", "Plateau"])
def test_the_linear_scaling_rule_follows_the_batch_size(schedule, folder, tmp_path, caplog):
    check(schedule, "twice the batch", 4, folder, tmp_path, base_batch_size=60)
    assert "goes on as in the checkpoint" not in caplog.text


@pytest.mark.filterwarnings("ignore:When using `Trainer.accumulate_grad_batches")
def test_a_run_whose_accumulation_changes_follows_the_curve(tmp_path):
    """One batch a step in two epochs, then four, the last step of each epoch with two."""
    for schedule in (Linear(warmup_epochs=1), OneCycle()):
        whole = fit(tmp_path / "whole", schedule, max_epochs=4)
        found = fit(tmp_path / "part", schedule, [GradientAccumulationScheduler({0: 1, 2: 4})], max_epochs=4)
        assert found == pytest.approx(whole[:20] + [whole[k] for k in (20, 24, 28, 30, 34, 38)], abs=0)


def test_plateau_takes_settings_from_the_configuration_and_counts_anew_in_a_new_run(tmp_path):
    """The rate would be halved after the first epoch of the new run, if that went on with the best of the other run."""
    part = stopped(tmp_path, "Plateau", 3)  # 1, 1, 1/2, and 1/4 is next
    goes_on = fit(tmp_path, Plateau(factor=0.1, patience=1), resume=shutil.copytree(part, tmp_path / "a"), max_epochs=6)
    assert goes_on[::10] == pytest.approx([2.5e-7, 2.5e-7, 2.5e-8], abs=0)
    checkpoint = Run(part).last_checkpoint
    new = fit(tmp_path / "new", Plateau(factor=0.5, patience=0), ckpt_path=checkpoint, max_epochs=6)
    assert new[::10] == pytest.approx([2.5e-7, 2.5e-7, 1.25e-7], abs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_val_batches": 0}, "Plateau follows val/loss, but no epoch ends with a validation"),
        ({"limit_train_batches": 0}, "limit_train_batches is 0, so nothing would be trained"),
    ],
)
def test_a_resume_that_cannot_be_leaves_the_folder_as_it_was(options, message, folder, tmp_path):
    part = shutil.copytree(stopped(folder, "Plateau", 6), tmp_path / "part")
    before = contents(part)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Plateau(), resume=part, **options)
    assert contents(part) == before


# -- the command line -------------------------------------------------------------------------------------------------


def rates_of(run):
    """The rate at each step that has been logged."""
    rows = list(csv.DictReader(run.metrics.read_text().splitlines()))
    key = next(name for name in rows[0] if name.startswith("lr-"))
    return [float(row[key]) for row in rows if row[key]]


@pytest.fixture
def options(digits):
    monitor = ["--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor", "--data.batch_size=120"]
    return [*digits, *monitor, "--trainer.test_after_fit=false", "--model.optimizer=torch.optim.SGD"]


def test_the_command_line_goes_on_with_a_larger_batch(command, options, logs):
    until = ["--trainer.callbacks+=helpers.stop_after.StopAfter", "--trainer.callbacks.epochs=2"]
    options = [
        *options,
        "--trainer.max_epochs=4",
        "--model.optimizer.lr=0.1",
        "--model.schedule=project.learning.Linear",
        "--model.schedule.warmup_epochs=0",
    ]
    assert command("fit", *options, *until)[0] == 0
    resume = ["--trainer.callbacks.StopAfter.epochs=99", "--data.batch_size=240"]
    status, _, err = command("fit", "--resume", str(logs / "digits"), *resume)
    assert status == 0, err
    rates = rates_of(Run.find(logs / "digits"))[-10:]
    assert rates == pytest.approx([0.05 - 0.005 * step for step in range(10)])


@pytest.mark.parametrize("change", [["--trainer.max_epochs=6"], ["--data.batch_size=60"]], ids=["length", "batch"])
def test_one_cycle_is_refused(change, command, options, logs):
    schedule = ["--model.schedule=project.learning.OneCycle", "--trainer.max_epochs=2"]
    assert command("fit", *options, *schedule)[0] == 0
    before = contents(logs)
    status, _, err = command("fit", "--resume", str(logs / "digits"), *change)
    assert status == 2 and "OneCycle was made for 20 steps" in err and err.count("\n") == 1
    assert contents(logs) == before
