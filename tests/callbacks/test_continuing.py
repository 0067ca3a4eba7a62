"""What a resume, a run from another run's checkpoint, and a run from weights alone take over; and what they leave."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from project.callbacks import BestAndLast, TellHowToResume, default_callbacks
from project.data import Digits
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.learning import Linear, OneCycle
from project.models import Classifier, SmallInception


def sgd(lr: float = 0.2, **options: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, **options)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def module(optimizer=None, **options) -> Classifier:
    seed_everything(0, verbose=False)
    options = {"optimizer": optimizer or sgd(), **options}
    return Classifier(SmallInception(10, (1, 8, 8), width=0.125), 10, (1, 8, 8), **options)


def make(logs: Path, *callbacks: Callback, **options) -> Trainer:
    options = {"max_epochs": 3, "limit_train_batches": 4, "test_after_fit": False, "experiment": "own", **options}
    options = {"accelerator": "cpu", "enable_progress_bar": False, "observe": False, "logger": False, **options}
    return Trainer(logs_dir=str(logs), callbacks=list(callbacks), **options)


def fit(trainer: Trainer, model: Classifier | None = None, **options) -> Run:
    trainer.fit(model or module(), datamodule=Digits(batch_size=64, seed=0), **options)
    assert trainer.run is not None
    trainer.run.config.touch()  # what the command line writes, and a resume looks for
    return trainer.run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(first: Path, second: Path) -> bool:
    one, two = load(first)["state_dict"], load(second)["state_dict"]
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def epochs_in(run: Run) -> list[int]:
    with run.metrics.open() as file:
        return [int(float(row["epoch"])) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """``lines()`` is what this package has logged so far."""
    monkeypatch.setattr(logging.getLogger("project"), "propagate", True)
    caplog.set_level(logging.INFO, logger="project")

    def read() -> str:
        text = "\n".join(caplog.messages)
        caplog.clear()
        return text

    return read


# -- a resume that fails ----------------------------------------------------------------------------------------------


def with_a_row_too_many(run: Run) -> Run:
    """As if the run had been killed in its second epoch, after a row and before a checkpoint."""
    text = run.metrics.read_text()
    run.metrics.write_text(f"{text}4321{',' * text.splitlines()[0].count(',')}\n")
    return run


class FailAtStep(Callback):
    """As a batch that is too large for the memory."""

    def on_before_backward(self, *_):
        raise ValueError("no memory for this step")


FAIL = {
    "another net": (lambda: SmallInception(10, (1, 8, 8), width=0.25), {}, None, "another net"),
    "another optimizer": (None, {"optimizer": adamw}, None, "the optimizer is AdamW, but .*--weights FILE"),
    "another schedule": (None, {"schedule": OneCycle()}, None, "the schedule is OneCycleLR, but .*--weights FILE"),
    "a step that fails": (None, {}, FailAtStep(), "no memory for this step"),
}


@pytest.mark.parametrize("name", FAIL)
def test_a_resume_that_fails_changes_nothing(name, logs):
    net, options, callback, found = FAIL[name]
    run = with_a_row_too_many(fit(make(logs, max_epochs=1, logger=True)))
    before = content(run.folder)
    model = Classifier(net(), 10, (1, 8, 8), optimizer=sgd()) if net else module(**options)
    with pytest.raises(ValueError, match=found):
        fit(make(logs, *filter(None, [callback]), max_epochs=2, logger=True), model, resume=str(run.folder))
    after = content(run.folder)
    begun = {path for path in after.keys() - before.keys() if "tfevents" in path and callback}
    assert {path: value for path, value in after.items() if path not in begun} == before
    fit(make(logs, max_epochs=2, logger=True), resume=str(run.folder))
    assert load(run.last_checkpoint)["epoch"] == 1
    assert "\n4321," not in run.metrics.read_text() and epochs_in(run) == [0, 1]
    assert len(json.loads(run.environment.read_text())["resumes"]) == 1


def test_options_of_a_resume_that_fails_are_not_kept(command, digits, logs):
    quick = ["--trainer.limit_train_batches=2", "--trainer.test_after_fit=false"]
    assert command("fit", *digits, *quick, "--trainer.max_epochs=1")[0] == 0
    run = Run.find(logs / "digits")
    before = content(run.folder)
    resume = ["fit", "--resume", str(run.folder), "--trainer.max_epochs=2"]
    status, _, err = command(*resume, "--model.net.width=0.5", "--trainer.callbacks+=helpers.stop_after.StopAfter")
    assert status == 2 and "another net" in err and content(run.folder) == before
    status, _, err = command(*resume)
    assert status == 0, err
    assert load(run.last_checkpoint)["epoch"] == 1 and "max_epochs: 2" in run.config.read_text()


# -- a resume with nothing to do --------------------------------------------------------------------------------------


def ended(logs: Path, *callbacks: Callback, resume: Run | None = None, **options) -> Run:
    return fit(make(logs, *callbacks, **options), **({"resume": str(resume.folder)} if resume else {}))


def patient(patience: int = 1, **options) -> EarlyStopping:
    return EarlyStopping("val/loss", min_delta=9.0, patience=patience, **options)  # no epoch is that much better


ENDED = {
    "epochs": ({"max_epochs": 2}, {"max_epochs": 2}, "2 of 2 epochs are done"),
    "fewer epochs": ({"max_epochs": 2}, {"max_epochs": 1}, "2 of 1 epochs are done"),
    "steps": ({"max_steps": 8}, {"max_steps": 8}, "8 of 8 steps are done"),
    "time": ({"max_epochs": 2}, {"max_time": {"microseconds": 1}, "max_epochs": 9}, "the time is over"),
}


@pytest.mark.parametrize("name", ENDED)
def test_a_resume_with_nothing_to_do_says_so_and_trains_nothing(name, logs, lines):
    first, second, found = ENDED[name]
    run = ended(logs, **first, **({"max_time": "00:01:00:00"} if name == "time" else {}))
    before, summary = content(run.folder), json.loads(run.summary.read_text())
    written = run.summary.stat().st_mtime_ns
    assert ended(logs, resume=run, **second) == run
    assert f"Nothing to train: {found}" in lines()
    after = content(run.folder)
    changed = {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
    assert changed <= {"summary.json"} and run.summary.stat().st_mtime_ns > written  # its rounded seconds may be equal
    again = json.loads(run.summary.read_text())
    assert {key: value for key, value in again.items() if "seconds" not in key} == {
        key: value for key, value in summary.items() if "seconds" not in key
    }


def test_a_run_that_early_stopping_has_ended_stays_ended_unless_it_has_more_patience(logs, lines):
    run = ended(logs, patient(), max_epochs=9)
    assert epochs_in(run) == [0, 1]
    assert ended(logs, patient(), max_epochs=9, resume=run) == run
    assert epochs_in(run) == [0, 1] and "Nothing to train: EarlyStopping has ended the run" in lines()
    assert ended(logs, patient(3), max_epochs=9, resume=run) == run
    assert epochs_in(run) == [0, 1, 2, 3]
    summary = json.loads(run.summary.read_text())
    assert summary["num_epochs"] == 4


def test_after_the_end_the_work_after_a_fit_is_done_again(logs):
    """It may be what was killed."""
    from project.compression.after_fit import is_complete

    run = ended(logs, patient(), max_epochs=9)
    trainer = make(logs, patient(), max_epochs=9)
    fit(trainer, resume=str(run.folder))
    assert is_complete(trainer)


class Failing(Callback):
    """Ends the process in a hook."""

    def __init__(self, hook: str, step: int = 0) -> None:
        def fail(trainer: Trainer, *_: object) -> None:
            if trainer.global_step >= step:
                raise RuntimeError("no power")

        setattr(self, hook, fail)


@pytest.mark.parametrize(
    "hook, step",
    [
        ("on_fit_end", 0),
        ("on_train_end", 0),
        ("on_validation_end", 8),
        ("on_train_epoch_end", 8),
        ("on_train_batch_start", 6),
    ],
)
def test_a_resumed_run_has_the_metrics_of_its_last_epoch(hook, step, logs):
    whole = ended(logs, max_epochs=2, val_check_interval=0.5)
    with pytest.raises(RuntimeError, match="no power"):
        ended(logs, Failing(hook, step), max_epochs=2, val_check_interval=0.5)
    run = Run(logs / "own/version_1")
    run.config.touch()
    assert not run.summary.is_file()
    seconds = load(run.last_checkpoint)["callbacks"]["WriteSummary"]["train_seconds"]
    ended(logs, max_epochs=2, val_check_interval=0.5, resume=run)
    summaries = [json.loads(each.summary.read_text()) for each in (run, whole)]
    metrics = [{key: value for key, value in each.items() if "second" not in key} for each in summaries]
    assert "train/loss" in metrics[1] and metrics[0] == metrics[1]
    assert run.metrics.read_text() == whole.metrics.read_text()
    assert summaries[0]["train_seconds"] >= round(seconds, 3) > 0


def test_a_run_that_was_killed_after_an_epochs_checkpoint_has_the_row_of_this_epoch(logs, monkeypatch):
    written = BestAndLast.on_train_epoch_end

    def fail(self, trainer, pl_module) -> None:
        written(self, trainer, pl_module)
        raise RuntimeError("no power")

    whole = ended(logs, max_epochs=2, val_check_interval=0.5)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no power"):
        patch.setattr(BestAndLast, "on_train_epoch_end", fail)
        ended(logs, max_epochs=2, val_check_interval=0.5)
    run = Run(logs / "own/version_1")
    run.config.touch()
    ended(logs, max_epochs=2, val_check_interval=0.5, resume=run)
    assert run.metrics.read_text() == whole.metrics.read_text()
    states = [load(each.last_checkpoint)["callbacks"] for each in (run, whole)]
    scores = [next(value for key, value in each.items() if "BestAndLast" in key)["current_score"] for each in states]
    assert scores[0] == scores[1] is not None


# -- a new run from another run's checkpoint --------------------------------------------------------------------------


def test_a_new_run_counts_its_own_patience_time_and_best_in_a_folder_of_ones_own(logs, tmp_path):
    def callbacks() -> list[Callback]:
        own = ModelCheckpoint(tmp_path / "mine", "{epoch}", monitor="val/loss", mode="max")  # best in the first epoch
        return [patient(), own]

    first = fit(make(logs, *callbacks(), max_epochs=9, max_time="00:00:01:00"))
    assert epochs_in(first) == [0, 1]
    trainer = make(logs, *callbacks(), max_epochs=9, max_time="00:00:01:00")
    second = fit(trainer, ckpt_path=str(first.last_checkpoint))
    assert second != first and epochs_in(second) == [2, 3]
    assert [path.name for path in (tmp_path / "mine").glob("epoch=[23].ckpt")]
    assert load(second.best_checkpoint)["epoch"] >= 2
    assert json.loads(second.summary.read_text())["best_checkpoint"] == "best.ckpt"


def test_settings_that_a_checkpoint_replaces_are_named(logs, lines):
    run = fit(make(logs, max_epochs=1))
    changed = module(sgd(0.05, weight_decay=0.5))
    trainer = make(logs, max_epochs=2)
    fit(trainer, changed, ckpt_path=str(run.last_checkpoint))
    assert "goes on as in the checkpoint: weight_decay is 0, not 0.5; lr is 0.2, not 0.05. To begin with" in lines()
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("schedule", [Linear, OneCycle])
def test_without_a_change_nothing_is_named(schedule, logs, lines):
    stop = make(logs, StopAfter(2), max_epochs=3)
    run = fit(stop, module(schedule=schedule()))
    lines()
    fit(make(logs, max_epochs=3), module(schedule=schedule()), resume=str(run.folder))
    assert "as in the checkpoint" not in lines()
    assert load(run.last_checkpoint)["epoch"] == 2


# -- weights alone ----------------------------------------------------------------------------------------------------


def test_weights_alone_begin_with_a_new_optimizer_schedule_and_epoch_0(logs):
    first = fit(make(logs, max_epochs=2))
    watch = Watch()
    second = fit(make(logs, watch, max_epochs=2), module(adamw), weights=str(first.last_checkpoint))
    assert watch.epoch == 0 and watch.step == 0 and not watch.optimizer_state
    for key, value in load(first.last_checkpoint)["state_dict"].items():
        assert torch.equal(watch.weights[key], value), key
    assert epochs_in(second) == [0, 1] and second != first
    assert load(second.last_checkpoint)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01


def test_weights_that_cannot_be_taken_are_refused_before_there_is_a_folder(logs, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"bad")
    for name, found in (("no.ckpt", "weights is .* no such file"), ("bad.ckpt", "weights is .* not a checkpoint")):
        with pytest.raises(ValueError, match=found):
            fit(make(logs), weights=str(tmp_path / name))
    for other in ("ckpt_path", "resume"):
        with pytest.raises(ValueError, match=f"weights and {other} are both given"):
            fit(make(logs), weights="a.ckpt", **{other: "b"})
    first = fit(make(logs, max_epochs=1))
    wider = Classifier(SmallInception(10, (1, 8, 8), width=0.25), 10, (1, 8, 8))
    with pytest.raises(ValueError, match="another net"):
        fit(make(logs), wider, weights=str(first.last_checkpoint))
    assert [folder.name for folder in (logs / "own").iterdir()] == ["version_0"]


def test_weights_on_the_command_line(command, digits, logs):
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.test_after_fit=false"]
    first = fit(make(logs, max_epochs=1), Classifier(SmallInception(10, (1, 8, 8), width=0.25), 10, (1, 8, 8)))
    status, _, err = command("fit", *digits, *quick, "--weights", str(first.best_checkpoint))
    assert status == 0, err
    run = Run.find(logs / "digits")
    assert epochs_in(run) == [0] and json.loads(run.summary.read_text())["num_steps"] == 2


# -- last.ckpt --------------------------------------------------------------------------------------------------------


class StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class Watch(Callback):
    """Keeps what a fit begins with, and the epoch of last.ckpt when each epoch begins."""

    def __init__(self) -> None:
        self.last: list[int] = []

    def on_train_start(self, trainer, pl_module):
        self.epoch, self.step = trainer.current_epoch, trainer.global_step
        self.optimizer_state = dict(trainer.optimizers[0].state)
        self.weights = {key: value.clone() for key, value in pl_module.state_dict().items()}

    def on_train_epoch_start(self, trainer, pl_module):
        path = trainer.run.last_checkpoint
        self.last.append(load(path)["epoch"] if path.is_file() else -1)


EVERY = {
    "every second epoch": {"check_val_every_n_epoch": 2},
    "never in this run": {"check_val_every_n_epoch": 9},
    "within the epoch": {"val_check_interval": 3},
}


@pytest.mark.parametrize("name", EVERY)
def test_last_is_the_last_epoch_however_rarely_is_validated(name, logs):
    watch = Watch()
    run = fit(make(logs, watch, max_epochs=3, **EVERY[name]))
    assert watch.last == [-1, 0, 1] and load(run.last_checkpoint)["epoch"] == 2
    assert load(run.last_checkpoint)["global_step"] == 12
    half = fit(make(logs, StopAfter(1), max_epochs=3, **EVERY[name]))
    again = fit(make(logs, max_epochs=3, **EVERY[name]), resume=str(half.folder))
    assert again == half and same(half.last_checkpoint, run.last_checkpoint)
    assert epochs_in(half) == epochs_in(run) == [0, 1, 2]


def test_last_is_the_end_also_between_two_checkpoints(logs):
    run = fit(make(logs, BestAndLast(every_n_epochs=2), max_epochs=3))
    assert load(run.last_checkpoint)["global_step"] == 12 and load(run.best_checkpoint)["global_step"] == 8


@pytest.mark.parametrize("save_last", [True, "link"])
def test_a_last_checkpoint_of_ones_own_is_the_runs_own(save_last, logs):
    own = ModelCheckpoint(monitor="val/loss", mode="max", filename="{epoch}", save_last=save_last)
    run = fit(make(logs, own, max_epochs=3))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best.ckpt", "epoch=0.ckpt", "last.ckpt"]
    assert load(run.last_checkpoint)["epoch"] == 2 and load(Path(own.best_model_path))["epoch"] == 0
    assert same(run.best_checkpoint, own.best_model_path)


def test_a_callback_of_ones_own_never_puts_less_into_last(logs):
    """It decides when, also within an epoch; but a resume needs the optimizer."""

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            path = trainer.run.last_checkpoint
            found.append(path.is_file() and ("optimizer_states" in load(path), load(path)["epoch"]))

    found: list[object] = []
    own = ModelCheckpoint(every_n_train_steps=3, save_last=True, save_weights_only=True)
    fit(make(logs, Look(), own, max_epochs=2))
    assert found == [False] * 3 + [(True, 0)] * 3 + [(True, 1)] * 2


# -- two fits of one trainer ------------------------------------------------------------------------------------------


def test_two_fits_of_one_trainer_are_two_runs(logs):
    own = ModelCheckpoint(monitor="val/loss", mode="max", filename="{epoch}")
    for callbacks in ([], [own], [patient()]):
        trainer = make(logs, *callbacks, max_epochs=2)
        first = fit(trainer)
        before = content(first.folder)
        second = fit(trainer)
        assert second != first and content(first.folder) == before
        assert content(second.folder).keys() == before.keys() and epochs_in(second) == [0, 1]
        for path in ("best_checkpoint", "last_checkpoint"):
            assert same(getattr(first, path), getattr(second, path))
        summary = json.loads(second.summary.read_text())
        assert summary["best_score"] == json.loads(first.summary.read_text())["best_score"]


def test_a_callback_that_tells_how_to_resume_is_not_doubled():
    own = TellHowToResume()
    found = [each for each in default_callbacks([own], progress=False) if isinstance(each, TellHowToResume)]
    assert found == [own]
