"""Runs without steps, without an end and without validations: they work, or one sentence refuses them at the start."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from project.learning import Linear, Plateau
from project.models import Classifier

STEPS = ["--model.schedule.class_path=project.learning.Steps", "--model.schedule.init_args.milestones=[1]"]
PLATEAU = [
    "--model.schedule.class_path=project.learning.Plateau",
    "--model.schedule.init_args={patience: 0, factor: 0.5}",
]
QUIET = ["--trainer.test_after_fit=false", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trainer.max_epochs=0"], "trainer.max_epochs is 0, so nothing would be trained"),
        (["--trainer.max_steps=0"], "trainer.max_steps is 0, so nothing would be trained"),
        (["--trainer.limit_train_batches=0.0"], "trainer.limit_train_batches is 0, so nothing would be trained"),
        (["--trainer.max_time=00:00:00:00"], "the run ended before its first step"),
        (["--trainer.max_epochs=-1"], "trainer.max_epochs is -1, but the schedule Linear needs the length"),
        ([*PLATEAU, "--data.val_fraction=0"], "the schedule Plateau follows val/loss, but no epoch ends"),
        ([*PLATEAU, "--trainer.limit_val_batches=0"], "the schedule Plateau follows val/loss, but no epoch ends"),
        (
            [*PLATEAU, "--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=15"],
            "the schedule Plateau follows val/loss, but no epoch ends",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_at_the_start(command, digits, logs, options, sentence):
    status, _, err = command("fit", *digits, "--trainer.max_epochs=2", *options)
    assert status == 2 and err.startswith(f"error: {sentence}") and err.count("\n") == 1, err
    assert not list(logs.glob("*/version_*"))


@pytest.mark.slow
def test_zero_epochs_from_a_checkpoint_test_its_weights(command, digits, logs):
    status, out, err = command("fit", *digits, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    assert status == 0, err
    best = logs / "digits/version_0/checkpoints/best.ckpt"
    status, again, err = command("fit", *digits, "--trainer.max_epochs=0", "--ckpt_path", str(best))
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("test accuracy"))
    assert line in again
    status, _, err = command("fit", *digits, "--trainer.max_epochs=0", "--weights", str(best))
    assert status == 2 and err == "error: trainer.max_epochs is 0, so nothing would be trained: choose 1 or more.\n"
    assert not (logs / "digits/version_2").exists()


@pytest.mark.parametrize("epochs", ["-1", "null"])
def test_a_run_may_end_by_time_alone(command, digits, logs, epochs):
    options = [f"--trainer.max_epochs={epochs}", "--trainer.max_time=00:00:00:01", *STEPS, *QUIET]
    status, _, err = command("fit", *digits, *options)
    assert status == 0, err
    assert (logs / "digits/version_0/checkpoints/last.ckpt").is_file()


class Rates(Callback):
    """Records the rate of each step of the optimizer."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def fit(tiny, schedule, lr=1.0, **options) -> list[float]:
    """The rates of a run of a net whose answers do not change without training."""
    rates = Rates()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr)}
    model = Classifier(net, 10, (1, 8, 8), schedule=schedule, **optimizer)
    options = {"num_sanity_val_steps": 0, **options}
    tiny.trainer([rates], **options).fit(model, datamodule=tiny.data(batch_size=20))
    return rates.seen


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_warm_up_in_epochs_keeps_its_length_if_only_steps_end_the_run(tiny):
    """Five batches in an epoch make three steps, the last one of a single batch."""
    found = fit(tiny, Linear(warmup_epochs=1), max_epochs=-1, max_steps=9, accumulate_grad_batches=2)
    assert found == pytest.approx([1 / 3, 2 / 3, 1, *(1 - step / 7 for step in range(1, 7))])


@pytest.mark.parametrize(("every", "falls"), [(1, [0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 0, 1, 1]), (3, [0] * 6)])
def test_plateau_waits_in_epochs_without_a_validation(tiny, every, falls):
    """Nothing improves at such a small rate, so the rate falls after each validation but the first."""
    found = fit(tiny, Plateau(factor=0.5, patience=0), lr=1e-6, max_epochs=6, check_val_every_n_epoch=every)
    assert found[::5] == pytest.approx([1e-6 * 0.5**fall for fall in falls], rel=1e-6, abs=0)


def test_plateau_may_follow_the_training_without_any_validation(tiny):
    schedule = Plateau("train/loss", factor=0.5, patience=0)
    found = fit(tiny, schedule, lr=1e-6, max_epochs=4, limit_val_batches=0)
    assert found[::5] == pytest.approx([1e-6, 1e-6, 5e-7, 2.5e-7], rel=1e-6, abs=0)
