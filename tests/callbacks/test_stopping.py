"""Ctrl-C and SIGTERM: what is kept, the command that resumes it, the exit status, and what a second signal does."""

import json
import shlex
import signal
import subprocess
import sys

import pytest
from helpers.signal_at import SignalAt

from project.frame.paths import Run


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
    assert f"Stopped. Kept: epochs 1 to 2, in '{run.folder}'" in out
    resume = next(line for line in out.splitlines() if line.startswith("resume "))
    assert SignalAt.handlers == [signal.SIG_DFL, signal.SIG_DFL]
    got, out, err = command(*shlex.split(resume)[2:], "--trainer.callbacks=null")
    assert got == 0, err
    assert json.loads(run.summary.read_text())["num_epochs"] == 3 and "test accuracy" in out


@pytest.mark.parametrize(("step", "words"), [(0, "nothing is kept"), (2, "Kept: no checkpoint yet")])
def test_a_fit_that_is_stopped_early_promises_nothing(step, words, command, digits, logs):
    stop = ["--trainer.callbacks+=helpers.signal_at.SignalAt", f"--trainer.callbacks.step={step}"]
    status, out, _ = command("fit", *digits, *stop)
    assert status == 130 and words in out
    assert bool(list(logs.glob("digits/version_*"))) == ("resume  " in out) == (step > 0)


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
