"""Progress on a terminal: a bar for the epoch, a bar for the fit, and above them one line for each finished epoch."""

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table

from project.callbacks.progress import ProgressLines
from project.learning.classifier import Classifier


class ProgressBars(ProgressLines):
    """Shows the epoch, the time left, images per second, and the training loss and accuracy of the epoch so far.

    Text that callbacks log or print meanwhile appears above the bars. Loss and accuracy are read from the device when
    the bars are drawn, not at every step.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.observe.progress_bars.ProgressBars
              init_args: {refresh_s: 1}

    Args:
        refresh_s: shortest time between two drawings, in seconds, 0 or more.

    Raises:
        ValueError: if ``refresh_s`` is negative.
    """

    def __init__(self, refresh_s: float = 0.25) -> None:
        super().__init__()
        if refresh_s < 0:
            raise ValueError(f"refresh_s is {refresh_s}, but it is a time in seconds: give 0 or more.")
        self.refresh_s = refresh_s
        self._live: Live | None = None
        self._drawn_at = -math.inf
        self._rows: list[tuple[str, Bar, str]] = []
        self._num_batches = 0
        self._fit_began_at, self._fit_began_with = 0.0, 0.0

    # -- fit -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_began_at, self._fit_began_with = time.perf_counter(), _share_of_fit(trainer)
        self._open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_due():
            self._rows = self._training_rows(trainer, pl_module, batch_idx + 1)
            self._draw(self._rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        super().on_train_end(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    # -- validation, test, prediction ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._begin_pass(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._count("sanity check" if trainer.sanity_checking else "validation", batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._end_pass(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_pass(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._count("test", trainer.num_test_batches)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_pass(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._count("predict", trainer.num_predict_batches)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_pass(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    # -- drawing -------------------------------------------------------------------------------------------------

    def _begin_pass(self, trainer: Trainer) -> None:
        """Begin a pass without training, such as validation. Within a fit its bar is below the bars of the fit."""
        self._num_batches = 0
        if trainer.state.fn != "fit":
            self._rows = []
            self._open()

    def _count(self, label: str, batches: list[int | float]) -> None:
        self._num_batches += 1
        if self._is_due():
            bar, percent = _bar(self._num_batches, sum(batches))
            self._draw([*self._rows, (label, bar, percent)])

    def _end_pass(self, trainer: Trainer) -> None:
        if trainer.state.fn == "fit":
            self._draw(self._rows)
        else:
            self._close()

    def _training_rows(self, trainer: Trainer, module: LightningModule, done: int) -> list[tuple[str, Bar, str]]:
        bar, percent = _bar(done, trainer.num_training_batches)
        of_all = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        seconds = self._clock.seconds
        left = _time_left(seconds * (trainer.num_training_batches - done) / done)
        speed = self._num_images / seconds if seconds else 0.0
        epoch = (f"epoch {trainer.current_epoch + 1}{of_all}", bar, f"{percent}  {left}  {speed:.0f} images/s")

        share, begun_with = _share_of_fit(trainer, done), self._fit_began_with
        bar, percent = _bar(share, 1.0 if share else math.inf)
        fit_seconds = time.perf_counter() - self._fit_began_at
        left = _time_left(fit_seconds * (1 - share) / (share - begun_with) if share > begun_with else math.inf)
        means = module.train_means() if isinstance(module, Classifier) else {}
        values = "  ".join(f"{name.removeprefix('train/')} {value.item():.4f}" for name, value in means.items())
        return [epoch, ("fit", bar, f"{percent}  {left}  {values}")]

    def _open(self) -> None:
        if self._live is None and self._enabled:
            # auto_refresh would draw in a thread, which might hold a lock while the loader's workers are forked.
            # soft_wrap lets the terminal wrap long lines, so that a path or a command can be copied as a whole.
            console = Console(soft_wrap=True)
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=sys.stderr.isatty())
            self._live.start()
            self._drawn_at = -math.inf

    def _is_due(self) -> bool:
        return self._live is not None and time.perf_counter() - self._drawn_at >= self.refresh_s

    def _draw(self, rows: list[tuple[str, Bar, str]]) -> None:
        if self._live is None:
            return
        width = self._live.console.width - len("^C ")  # if the echo of Ctrl-C broke the line, the bars would shift
        table = Table.grid(padding=(0, 1), expand=True)
        table.width = max(width, 1)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, min_width=5)
        table.add_column(no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._live.update(table, refresh=True)
        self._drawn_at = time.perf_counter()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live, self._rows = None, []


def _bar(done: float, total: float) -> tuple[Bar, str]:
    """A bar and its percentage. If the total is infinite or not positive, the bar pulses and has no percentage."""
    if not math.isfinite(total) or total <= 0:
        return Bar(total=None, pulse=True), "    "
    return Bar(total=total, completed=done), f"{100 * done / total:3.0f} %"


def _share_of_fit(trainer: Trainer, num_batches: int = 0) -> float:
    """The share of the fit that is done, in [0, 1], after ``num_batches`` of this epoch; 0 if the fit has no end."""
    shares = [0.0]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        shares.append((trainer.current_epoch + num_batches / trainer.num_training_batches) / trainer.max_epochs)
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    return min(1.0, max(shares))


def _time_left(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} left" if hours else f"{minutes}:{rest:02} left"
