"""The bars of a terminal, drawn into a string; and a fit that is watched and stopped through a pseudo-terminal."""

import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from rich.console import Console

from project.callbacks import TellHowToResume
from project.callbacks.observe.progress_bars import ProgressBars
from project.frame.paths import Run
from project.models import Classifier

ROOT = Path(__file__).resolve().parents[2]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def screen(monkeypatch):
    """What is written to the terminal."""
    text = io.StringIO()
    monkeypatch.setattr(
        "project.callbacks.observe.progress_bars.Console",
        lambda **options: Console(file=text, force_terminal=True, width=100, **options),
    )
    return lambda: ESCAPE.sub("", text.getvalue())


class Speak(Callback):
    def on_train_batch_end(self, *_):
        sys.stdout.write(f"a callback speaks {'at length ' * 12}\n")


def test_every_stage_has_its_bar_and_leaves_the_terminal_as_it_was(tiny, screen):
    streams, bars = (sys.stdout, sys.stderr), ProgressBars(refresh_s=0)
    trainer, model, data = tiny.trainer([Speak(), bars], enable_progress_bar=True), tiny.classifier(), tiny.data()
    trainer.fit(model, data)
    shown = screen()
    for pattern in (
        r"sanity check ━+ 100 %",
        r"epoch 1/2 ━[━╸╺]+  17 %  0:01 left  \d+ images/s",
        r"fit +━[━╸╺]+  25 %  \d:\d\d left  loss \d\.\d{4}  accuracy 0\.\d{4}",
        r"validation +━+ 100 %",
        r"a callback speaks (at length ){12}\n",
    ):
        assert re.search(pattern, shown), pattern
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data.test_dataloader())
    assert re.search(r"test +━[━╸╺]+  25 %", screen()) and re.search(r"predict +━+ 100 %", screen())
    assert bars._live is None and (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_epochs": -1, "max_steps": 8}])
def test_a_fit_of_any_length_is_drawn(options, tiny, screen):
    tiny.trainer([ProgressBars(refresh_s=0)], enable_progress_bar=True, **options).fit(tiny.classifier(), tiny.data())
    assert "fit " in screen()


def test_loss_and_accuracy_are_those_of_the_epoch_and_read_only_when_drawn(tiny, screen, monkeypatch):
    read = []
    means = Classifier.train_means
    monkeypatch.setattr(Classifier, "train_means", lambda self: read.append(means(self)) or read[-1])
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_progress_bar": True}
    trainer = tiny.trainer([ProgressBars(refresh_s=3600)], **options)
    trainer.fit(tiny.classifier(), tiny.data())
    assert len(read) == 2  # after the first batch, and by the module at the epoch's end
    assert f"loss {read[0]['train/loss']:.4f}  accuracy {read[0]['train/accuracy']:.4f}" in screen()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_bars_are_gone_after_an_error(error, tiny, screen):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 2:
                raise error

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stdout, bars = sys.stdout, ProgressBars(refresh_s=0)
    try:
        with pytest.raises((SystemExit, RuntimeError)):
            trainer = tiny.trainer([TellHowToResume(), bars, Fail()], enable_progress_bar=True)
            trainer.fit(tiny.classifier(), tiny.data())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert bars._live is None and sys.stdout is stdout


def test_a_negative_refresh_is_refused():
    with pytest.raises(ValueError, match="refresh_s is -1"):
        ProgressBars(refresh_s=-1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_terminal_shows_the_fit_and_ctrl_c_says_how_to_resume(digits, logs, tmp_path):
    fcntl, pty, termios = pytest.importorskip("fcntl"), pytest.importorskip("pty"), pytest.importorskip("termios")
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))

    def own_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, as this test may be, ignores it
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "project", "fit", *digits, "--trainer.max_epochs=500", "--trainer.experiment=my run"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "PROJECT_LOGS_DIR": str(logs)},
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(secondary)
    shown = _read(primary, process, until=r"epoch 3/500: ")
    os.write(primary, b"\x03")
    shown += _read(primary, process)
    assert process.wait(60) == 130, shown
    run = Run.find(logs / "my run")
    for pattern in (
        r"device         .*1 thread, precision 32-true\r\n",
        r"data           1318 training, 120 validation, 359 test images; 10 classes, the rarest '8' with 127",
        rf"run            '{run.folder}'\r\n",
        r"epoch 1/500: train/loss \S+, train/accuracy \S+, val/loss \S+, val/accuracy \S+ \(\S+ s, \d+ images/s\)",
        r"epoch [1-3]/500 [━╸╺]+ +\d+ %  \d:\d\d left  \d+ images/s",
        r"fit +[━╸╺]+ +\d %  \d+:\d\d(:\d\d)? left  loss \d\.\d{4}  accuracy \d\.\d{4}",
        r"Stopped. Kept: epochs 1 to \d+( and epoch \d+ to batch \d+)?, in ",
        rf"resume         project fit --resume '{run.folder}'\r\n",
    ):
        assert re.search(pattern, shown), f"{pattern}\n{shown}"
    assert "Traceback" not in shown


def _read(terminal: int, process: subprocess.Popen, until: str = r"$^") -> str:
    """What a terminal shows, without its escape sequences, until a pattern is there or the process ends."""
    shown, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux: the other side is closed
            break
        shown += part.decode(errors="replace")
        if not part or re.search(until, ESCAPE.sub("", shown)):
            break
    return ESCAPE.sub("", shown)
