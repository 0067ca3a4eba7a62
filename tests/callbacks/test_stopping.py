"""Ctrl-C and SIGTERM: what is kept, the command that resumes it, the exit status, and what a second signal does."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.signal_at import SignalAt
from helpers.slow import fast
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import BestAndLast
from project.data import Digits
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.models import Classifier, SmallInception

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of this process as they were; a shell's background job, as this may be, ignores Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_fit_says_how_to_resume_and_that_works(number, status, command, digits, logs):
    options = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=4", "--trainer.experiment=my run"]
    stop = ["--trainer.callbacks+=helpers.signal_at.SignalAt", f"--trainer.callbacks.number={int(number)}"]
    got, out, err = command("fit", *digits, *options, *stop, "--trainer.callbacks.step=9")
    assert (got, err) == (status, "")
    run = Run.find(logs / "my run")
    assert f"Stopped. Kept: epochs 1 to 2 and epoch 3 to batch 2, in '{run.folder}'" in out
    resume = next(line for line in out.splitlines() if line.startswith("resume "))
    assert SignalAt.handlers == [signal.SIG_DFL, signal.SIG_DFL]
    got, out, err = command(*shlex.split(resume)[2:], "--trainer.callbacks=null")
    assert got == 0, err
    assert json.loads(run.summary.read_text())["num_epochs"] == 3 and "test accuracy" in out


def test_a_fit_without_checkpoints_promises_nothing(command, digits, logs):
    stop = ["--trainer.callbacks+=helpers.signal_at.SignalAt", "--trainer.callbacks.step=2"]
    status, out, _ = command("fit", *digits, *stop, "--trainer.enable_checkpointing=false")
    assert status == 130 and "Kept: no checkpoint yet" in out


class SignalBefore(Callback):
    """Sends a signal before the first batch; the sanity check of the validation is over then."""

    def on_sanity_check_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_fit_that_is_stopped_before_its_first_step_leaves_nothing(command, digits, logs):
    status, out, _ = command("fit", *digits, f"--trainer.callbacks+={__name__}.SignalBefore")
    assert status == 130 and "nothing is kept" in out and "resume  " not in out
    assert not list(logs.glob("digits/version_*"))


STEPS = 5
"""Steps of an epoch."""


def fit(logs, epochs=2, callbacks=(), **options):
    """A small fit; ``SystemExit`` and ``SIGTERMException`` end it as a signal does."""
    seed_everything(0, verbose=False)
    resume = options.pop("resume", None)
    trainer = Trainer(
        accelerator="cpu",
        logs_dir=str(logs),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        observe=False,
        logger=False,
        max_epochs=epochs,
        test_after_fit=False,
        **{"limit_train_batches": STEPS, **options},
    )
    with suppress(SystemExit):
        module = Classifier(SmallInception(10, (1, 8, 8), width=0.125), 10, (1, 8, 8))
        trainer.fit(module, datamodule=Digits(batch_size=64), resume=resume)
    trainer.run.config.touch()
    return trainer.run


def content(run):
    return torch.load(run.last_checkpoint, weights_only=True)


CASES = {
    "within an epoch": (7, {}, 8),
    "Ctrl-C": (7, {"number": signal.SIGINT}, 8),
    "after the first batch": (0, {}, 1),
    "in the batch before the last one of an epoch": (3, {}, 4),
    "in the last batch of an epoch": (4, {}, 5),
    "in the last batch of an epoch without checkpoint": (4, {"every": 5}, 6),
    "in the last batch": (9, {"every": 5}, 10),
    "beside step checkpoints": (7, {"steps": 3}, 8),
    "between two steps of the optimizer": (2, {"accumulate_grad_batches": 2}, 3),
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", fast(CASES, 4))
def test_the_first_signal_waits_for_the_batch_and_keeps_it(name, logs):
    step, options, kept = CASES[name]
    options = dict(options)
    number, every, steps = options.pop("number", signal.SIGTERM), options.pop("every", 1), options.pop("steps", None)

    def callbacks():
        own = [ModelCheckpoint(every_n_train_steps=steps, save_last=True)] if steps else []
        return [BestAndLast(every_n_epochs=every), *own]

    whole = fit(logs / "whole", 2, callbacks(), **options)
    run = fit(logs / "stopped", 2, [*callbacks(), SignalAt(number, step)], **options)
    assert content(run)["global_step"] == kept
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fit(logs / "stopped", 2, callbacks(), resume=str(run.folder), **options)
    first, second = content(whole), content(run)
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())
    assert first["loops"]["fit_loop"] == second["loops"]["fit_loop"]
    assert first["lr_schedulers"] == second["lr_schedulers"]
    rows = [run.metrics.read_text().split() for run in (whole, run)]
    assert sorted(rows[0]) == sorted(rows[1])


def test_a_signal_at_the_end_of_the_training_need_not_wait(logs):
    """What follows is done again by a resumed run."""
    done = []

    class Finish(Callback):
        def on_train_end(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("to the end")

    run = fit(logs, 1, [Finish()])
    assert not done and content(run)["global_step"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status", "steps"), [(signal.SIGINT, 130, None), (signal.SIGTERM, 143, 3)])
def test_two_processes_stop_after_the_same_batch(number, status, steps, logs, digits):
    """The signal reaches the first process alone."""
    config = [*digits, "--trainer.max_epochs=2", "--trainer.test_after_fit=false", "--trainer.accelerator=cpu"]
    config += ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=64", "--trainer.log_every_n_steps=1"]
    if steps:
        config += ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
        config += [f"--trainer.callbacks.every_n_train_steps={steps}", "--trainer.callbacks.save_last=true"]
    stop = ["--trainer.callbacks+=helpers.signal_at.SignalAt", f"--trainer.callbacks.number={int(number)}"]
    stop += ["--trainer.callbacks.step=14", "--trainer.callbacks.rank=0"]

    def run(*args):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        command = [sys.executable, "-m", "project", "fit", *args]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    assert run(*config, "--trainer.experiment=whole").returncode == 0
    done = run(*config, *stop, "--trainer.experiment=stopped")
    assert done.returncode == status, done.stderr
    assert "Kept: epochs 1 to 1 and epoch 2 to batch 5" in done.stdout and "Traceback" not in done.stderr
    whole, stopped = Run.find(logs / "whole"), Run.find(logs / "stopped")
    options = ["--trainer.callbacks=null"] if not steps else []
    done = run(
        "--resume", str(stopped.folder), *options, *(["--trainer.callbacks.SignalAt.step=1000"] if steps else [])
    )
    assert done.returncode == 0, done.stderr
    first, second = content(whole)["state_dict"], content(stopped)["state_dict"]
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_monitor_that_nothing_logs_is_named_in_one_sentence(command, digits, logs):
    own = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.monitor=val/acc"]
    status, _, err = command("fit", *digits, *own, "--trainer.max_epochs=1")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "val/acc'" in err and "val/accuracy" in err


@pytest.mark.slow
def test_a_second_sigterm_ends_the_process_at_once(logs, tmp_path):
    """The first waits for the end of a batch that never ends."""
    code = """
import signal, sys, time
from lightning.pytorch import Callback
from project.callbacks import TellHowToResume
from project.data import Digits
from project.models import Classifier, SmallInception
from project.frame.verbs import Trainer
class Hang(Callback):
    def on_train_batch_start(self, *_):
        sys.stdout.write("hangs\\n"); sys.stdout.flush()
        while True: time.sleep(0.01)
trainer = Trainer(accelerator="cpu", callbacks=[Hang()], enable_progress_bar=False, observe=False)
trainer.fit(Classifier(SmallInception(10, (1, 8, 8)), 10, (1, 8, 8)), datamodule=Digits())
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "hangs\n"
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.slow
def test_two_processes_stop_when_they_ask_each_other(logs, digits):
    """The signal reaches the first process alone, in a batch in which the processes do not ask each other."""
    config = [*digits, "--trainer.max_epochs=2", "--trainer.test_after_fit=false", "--trainer.accelerator=cpu"]
    config += ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=64", "--trainer.log_every_n_steps=2"]
    stop = ["--trainer.callbacks+=helpers.signal_at.SignalAt", "--trainer.callbacks.number=15"]
    stop += ["--trainer.callbacks.step=14", "--trainer.callbacks.rank=0"]

    def run(*args):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        command = [sys.executable, "-m", "project", "fit", *args]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)

    assert run(*config, "--trainer.experiment=whole").returncode == 0
    done = run(*config, *stop, "--trainer.experiment=stopped")
    assert done.returncode == 143, done.stderr
    assert "Stopping within 2 batches" in done.stderr and "Traceback" not in done.stderr
    assert re.search("Kept: epochs 1 to 1 and epoch 2 to batch [2468],", done.stdout), done.stdout
    whole, stopped = Run.find(logs / "whole"), Run.find(logs / "stopped")
    done = run("--resume", str(stopped.folder), "--trainer.callbacks=null")
    assert done.returncode == 0, done.stderr
    first, second = content(whole)["state_dict"], content(stopped)["state_dict"]
    assert all(torch.equal(value, second[key]) for key, value in first.items())
