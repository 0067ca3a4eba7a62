"""A teacher in a run: when it teaches, that it leaves no trace, and whom it refuses."""

from pathlib import Path

import pytest
import torch
from helpers.pruning_run import STEPS, TinyNet, differences, fit, pruning, weights_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import BestAndLast, DistillFrom
from project.compression import OneShot
from project.frame.paths import Run
from project.losses import Distillation
from project.models import Classifier

ROOT = Path(__file__).resolve().parents[3]


class Teachers(Callback):
    """Which steps had a teacher."""

    def __init__(self) -> None:
        self.steps: list[bool] = []
        self.last: Distillation | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.last = pl_module.distillation  # type: ignore[assignment]
        self.steps.append(self.last is not None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tmp_path_factory.mktemp("teacher"), epochs=3, seed=5).run


def test_another_runs_net_teaches_from_the_first_step(teacher: Run, tmp_path: Path) -> None:
    watch = Teachers()
    plain = fit(tmp_path / "plain").run
    run = fit(tmp_path / "taught", DistillFrom(str(teacher.folder)), watch).run
    assert watch.steps == [True] * 2 * STEPS
    assert watch.last is not None
    taught, wanted = watch.last._teacher[0].state_dict(), weights_of(teacher.best_checkpoint)
    assert not differences(taught, wanted)
    assert differences(weights_of(run.last_checkpoint), weights_of(plain.last_checkpoint))
    assert weights_of(run.last_checkpoint).keys() == weights_of(plain.last_checkpoint).keys()


def test_a_teacher_that_begins_later_leaves_the_epochs_before_as_they_are(teacher: Run, tmp_path: Path) -> None:
    watch, late = Teachers(), DistillFrom(str(teacher.folder), begin_epoch=1)
    plain = fit(tmp_path / "plain", pruning(schedule=OneShot(0.5)), epochs=1).run
    run = fit(tmp_path / "taught", pruning(schedule=OneShot(0.5)), late, watch, epochs=1).run
    assert watch.steps == [False] * STEPS + [True] * STEPS
    levels = [(weights_of(plain.level_checkpoint(n)), weights_of(run.level_checkpoint(n))) for n in (0, 1)]
    assert [bool(differences(*pair)) for pair in levels] == [False, True]


def test_a_teacher_without_weight_changes_no_bit(teacher: Run, tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain").run
    run = fit(tmp_path / "taught", DistillFrom(str(teacher.folder), weight=0.0)).run
    assert not differences(weights_of(run.last_checkpoint), weights_of(plain.last_checkpoint))


def test_the_own_dense_net_teaches_once_it_is_pruned(tmp_path: Path) -> None:
    watch = Teachers()
    run = fit(tmp_path, pruning(schedule=OneShot(0.5)), DistillFrom(), watch).run
    assert watch.steps == [False] * 2 * STEPS + [True] * 2 * STEPS
    assert watch.last is not None
    assert not differences(watch.last._teacher[0].state_dict(), weights_of(run.level_checkpoint(0)))


class FailAt(Callback):
    """Ends the process before a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("no power")


@pytest.mark.parametrize("own", [True, False], ids=["own dense net", "another run"])
def test_a_run_that_is_resumed_within_an_epoch_has_its_teacher_again(own: bool, teacher: Run, tmp_path: Path) -> None:
    def run(name: str, step: int | None, watch: Teachers, resume: Run | None = None) -> Run:
        taught = DistillFrom() if own else DistillFrom(str(teacher.folder), begin_epoch=2)
        callbacks = [pruning(schedule=OneShot(0.5)), taught, watch, FailAt(step)]
        return fit(tmp_path / name, *callbacks, resume=resume, val_check_interval=0.5).run

    whole = run("whole", None, Teachers())
    with pytest.raises(RuntimeError, match="no power"):
        run("resumed", 3 * STEPS + 4, Teachers())
    resumed = run("resumed", None, watch := Teachers(), _configured(tmp_path))
    assert watch.steps == [True] * 3
    assert not differences(weights_of(resumed.last_checkpoint), weights_of(whole.last_checkpoint))


def test_an_error_ends_the_teaching_but_its_checkpoint_has_the_teacher(teacher: Run, tmp_path: Path) -> None:
    class Module(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            self.seen = pl_module

    module = Module()
    saved = ModelCheckpoint(tmp_path / "saved", save_on_exception=True)
    with pytest.raises(RuntimeError, match="no power"):
        fit(tmp_path, DistillFrom(str(teacher.folder)), module, FailAt(STEPS + 3), saved)
    assert module.seen.distillation is None
    (path,) = (tmp_path / "saved").glob(f"*step={STEPS + 3}.ckpt")
    assert torch.load(path, weights_only=True)["callbacks"]["DistillFrom"] == {"has_teacher": True}


def test_the_file_of_a_later_epoch_teaches_no_earlier_one(tmp_path: Path) -> None:
    """The run was killed in its first round, and the last checkpoint is older than the end of the dense training."""

    def run(name: str, step: int | None, resume: Run | None = None) -> Run:
        callbacks = [pruning(schedule=OneShot(0.5)), DistillFrom(), FailAt(step), BestAndLast(every_n_epochs=2)]
        return fit(tmp_path / name, *callbacks, epochs=3, resume=resume).run

    whole = run("whole", None)
    with pytest.raises(RuntimeError, match="no power"):
        run("resumed", 3 * STEPS + 2)
    resumed = run("resumed", None, _configured(tmp_path))
    assert not differences(weights_of(resumed.last_checkpoint), weights_of(whole.last_checkpoint))


def _configured(folder: Path) -> Run:
    """The stopped run, with the file that a resume looks for."""
    run = Run(folder / "resumed/pruning/version_0")
    run.config.touch()
    return run


def test_others_teachers_are_refused(teacher: Run, tmp_path: Path) -> None:
    student = Classifier(TinyNet(4), 4, (1, 8, 8))
    with pytest.raises(ValueError, match="another net"):
        DistillFrom(str(teacher.folder)).setup(Trainer(logger=False), student, "fit")
    with pytest.raises(ValueError, match=r"teacher is .*no such folder"):
        DistillFrom(str(tmp_path / "nix")).setup(Trainer(logger=False), student, "fit")
    with pytest.raises(ValueError, match="temperature is -1"):
        DistillFrom(temperature=-1)
    with pytest.raises(ValueError, match="begin_epoch is 3, but the run's own dense net"):
        DistillFrom(begin_epoch=3)
    with pytest.raises(ValueError, match="begin_epoch is -1"):
        DistillFrom(str(teacher.folder), begin_epoch=-1)


def test_a_smaller_net_learns_from_a_run_of_the_command_line(command, digits, logs) -> None:  # type: ignore[no-untyped-def]
    short = ["--trainer.max_epochs=1", "--trainer.test_after_fit=false", "--trainer.limit_train_batches=2"]
    fragment = ["--config", str(ROOT / "configs/compression/distillation.yaml")]
    assert command("fit", *digits, *short, "--trainer.experiment=teacher")[0] == 0
    teacher = f"--trainer.callbacks.teacher={logs / 'teacher'}"
    status, _, err = command("fit", *digits, *fragment, teacher, "--model.net.stages=[[64]]", *short)
    assert status == 0, err
