"""Ctrl-C and SIGTERM during a fit.

The first signal ends the run after the batch, with a checkpoint, and shows how to resume it. Several processes stop at
the next multiple of ``log_every_n_steps`` steps of the epoch. A second signal ends the process at once.
"""

import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project.callbacks.checkpoint import BestAndLast
from project.callbacks.places import run_of
from project.frame.paths import as_argument
from project.learning.checkpoints import check_checkpoint

log = logging.getLogger(__name__)


class TellHowToResume(Callback):
    """Stops a fit at Ctrl-C and SIGTERM: saves a checkpoint, and logs what is kept and the command that resumes it.

    :func:`~project.callbacks.default_callbacks` puts it into every run.

    Example::

        >>> from project.callbacks import TellHowToResume, default_callbacks
        >>> type(default_callbacks(progress=False)[0]) is TellHowToResume
        True
    """

    def __init__(self) -> None:
        self._received: int | None = None  # the signal
        self._is_training = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the end of the batch at the first signal. A second one ends the process."""
        self._received, self._is_training = None, True
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set signal handlers
        every = _num_batches(trainer)

        def stop(signum: int, frame: FrameType | None) -> None:
            self._received = signum
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # Otherwise Ctrl-C would end a notebook's kernel.
            signal.signal(signal.SIGINT, signal.default_int_handler if "ipykernel" in sys.modules else signal.SIG_DFL)
            if signum == signal.SIGTERM and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signum)  # the processes that this one has started
            if not self._is_training:
                raise self._exception()
            if trainer.is_global_zero:  # `print` may not be called while another one is being written
                when = "after this batch" if every == 1 else f"within {every} batches"
                os.write(2, f"\nStopping {when}. A second signal stops at once.\n".encode())

        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, stop)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.completed
        if done % _num_batches(trainer):
            return
        # Lightning 2.6 counts a step too many after a checkpoint of before the first batch of an epoch.
        is_whole = done % trainer.accumulate_grad_batches == 0 if done else self._is_saved(trainer)
        if is_whole and self._is_asked(trainer):
            progress.current.ready -= 1  # the checkpoint is one of before this batch
            progress.total.ready -= 1
            progress.is_last_batch = False
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_training = False  # what follows is done again by a resumed run: a signal need not wait
        if self._is_asked(trainer):
            self._stop(trainer)

    def _is_asked(self, trainer: Trainer) -> bool:
        """Whether one of the processes has received a signal. All processes must call this in the same batch."""
        return trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)

    def _is_saved(self, trainer: Trainer) -> bool:
        return all(each._last_global_step_saved == trainer.global_step for each in _checkpoints(trainer))

    def _stop(self, trainer: Trainer) -> None:
        for callback in _checkpoints(trainer):
            callback.save_now(trainer)
        raise self._exception()

    def _exception(self) -> BaseException:
        return KeyboardInterrupt() if self._received == signal.SIGINT else SIGTERMException()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # otherwise Lightning ignores SIGINT from here on
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run = run_of(trainer)
        if run is None or trainer.state.fn not in ("fit", "test"):
            return
        log.info("")  # ends the line on which the terminal has written ^C
        if trainer.state.fn == "test":
            log.info("Stopped. To test again: project test --run %s", as_argument(run.folder))
            return
        checkpoint = check_checkpoint(run.last_checkpoint) if run.last_checkpoint.is_file() else None
        if checkpoint is None and trainer.global_step == 0:
            log.info("Stopped before the first step: nothing is kept.")
            return
        kept = "no checkpoint yet" if checkpoint is None else _content(checkpoint)
        log.info("Stopped. Kept: %s, in %s", kept, as_argument(run.folder))
        log.info("resume         project fit --resume %s", as_argument(run.folder))


def _num_batches(trainer: Trainer) -> int:
    """Number of batches from one question for a signal to the next. In several processes the devices wait for it."""
    every: int = max(trainer.log_every_n_steps, 1) * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
    return every if trainer.world_size > 1 else 1


def _checkpoints(trainer: Trainer) -> list[BestAndLast]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestAndLast)]


def _content(checkpoint: dict[str, Any]) -> str:
    """The part of the training that a checkpoint holds, in words."""
    progress = checkpoint["loops"]["fit_loop"]
    epochs = progress["epoch_progress"]["current"]["processed"]
    batches = progress["epoch_loop.batch_progress"]["current"]["processed"] if epochs == checkpoint["epoch"] else 0
    words = [f"epochs 1 to {epochs}" if epochs else "", f"epoch {epochs + 1} to batch {batches}" if batches else ""]
    return " and ".join(filter(None, words))
