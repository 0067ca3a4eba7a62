"""A callback for the tests that sends its own process a signal, as Ctrl-C (2, SIGINT) or `kill` (15, SIGTERM) does."""

import os
import signal

from lightning.pytorch import Callback


class SignalAt(Callback):
    """Sends signal ``number`` when the step ``step`` is to be made, in all processes or in that of ``rank``."""

    handlers: list = []
    """What a second SIGINT and SIGTERM would do while the first one ends the run."""

    def __init__(self, number: int = 2, step: int = 0, rank: int | None = None) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)

    def on_exception(self, trainer, pl_module, exception):
        SignalAt.handlers[:] = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
