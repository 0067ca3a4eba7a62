"""Ctrl-C and SIGTERM during a fit.

The first signal ends the run in order and shows how to resume it. A second signal ends the process at once.
"""

import logging
import signal
import threading
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from project.callbacks.places import run_of
from project.frame.paths import as_argument
from project.learning.checkpoints import check_checkpoint

log = logging.getLogger(__name__)


class TellHowToResume(Callback):
    """Logs what a stopped run has kept, and the command that resumes it.

    :func:`~project.callbacks.default_callbacks` puts it into every run.

    Example::

        >>> from project.callbacks import TellHowToResume, default_callbacks
        >>> type(default_callbacks(progress=False)[0]) is TellHowToResume
        True
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a second SIGTERM end the process.

        Lightning waits for the end of the batch after the first SIGTERM, and ignores further ones.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set signal handlers
        handler = signal.getsignal(signal.SIGTERM)

        def stop(signum: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if callable(handler):
                handler(signum, frame)

        signal.signal(signal.SIGTERM, stop)

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
        kept = "no checkpoint yet" if checkpoint is None else f"epochs 1 to {checkpoint['epoch'] + 1}"
        log.info("Stopped. Kept: %s, in %s", kept, as_argument(run.folder))
        log.info("resume         project fit --resume %s", as_argument(run.folder))
