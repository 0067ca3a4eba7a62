"""The loggers beside TensorBoard: a CSV file in the run's folder, and lines on the terminal."""

import csv
import logging
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from project.frame.paths import write_whole


class MetricsCSV(Logger):
    """Appends each logged row to ``metrics.csv``. For a new metric it adds a column and writes the file again.

    Args:
        path: path of the file; rows that it has already are kept, because a resumed run continues it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = ["step"]
        self._is_stale = False
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            reader = csv.DictReader(line for line in lines if line.endswith("\n"))
            self.rows = [{key: value for key, value in row.items() if value} for row in reader]
            self.columns = list(reader.fieldnames or self.columns)
            self._is_stale = not lines or not lines[-1].endswith("\n")  # a full disk has cut the last row

    @property
    def name(self) -> str:
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        return self.path.parent.name

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` has the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step, **metrics}
        if not any(_texts(row) == _texts(other) for other in self.rows[-3:]):  # see log_epoch
            self.rows.append(row)
        elif not self._is_stale:
            return
        new = [key for key in row if key not in self.columns]
        if new or self._is_stale or not self.path.is_file():
            self.columns += new
            self._rewrite()
            self._is_stale = False
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Delete the rows after ``step``, because a resumed run logs them again.

        The file changes with the next row: a resume that fails leaves it as it is.
        """
        self.rows, self._is_stale = [row for row in self.rows if int(row["step"]) <= step], True

    def _rewrite(self) -> None:
        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)

        write_whole(self.path, write)


def _texts(row: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in row.items()}


def log_epoch(trainer: Trainer) -> None:
    """Write the metrics of an epoch's end into ``metrics.csv`` before the checkpoint of this moment.

    Lightning 2.6 writes them after it: a run that is killed between the two and resumed would not have this row. When
    Lightning logs the same row, or a resumed run repeats the end of the epoch, it is not written again.
    """
    metrics = convert_tensors_to_scalars(trainer._logger_connector.metrics["log"])
    for logger in trainer.loggers if metrics else ():
        if isinstance(logger, MetricsCSV):
            logger.log_metrics({"epoch": trainer.current_epoch, **metrics}, trainer.global_step - 1)


class _Stdout(logging.StreamHandler[Any]):
    """Writes to the current ``sys.stdout``, because progress bars replace it by their own stream."""

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, stream: Any) -> None:
        """Do nothing: the stream is always ``sys.stdout``."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Go on without output if nobody reads it any more, as after ``project fit … | head -1``."""
        if isinstance(sys.exception(), BrokenPipeError):
            leave_stdout()
        else:
            super().handleError(record)


def leave_stdout() -> None:
    """Let all further output go nowhere, because the process that has read it is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def setup_logging(level: int = logging.INFO) -> None:
    """Print the log lines of this package without prefix, in the first process only. Of Lightning print warnings only.

    Args:
        level: lowest level of the package's lines that are printed, any level of :mod:`logging`.
    """
    handler = _Stdout()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("project")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if rank_zero_only.rank else level)  # type: ignore[attr-defined]
    logger.propagate = False
    threading.excepthook = _tell
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*isinstance.*LeafSpec.*")  # Lightning itself causes it


def _tell(found: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, but not of TensorBoard's, whose error the main thread raises again."""
    if "tensorboard" not in type(found.thread).__module__:
        threading.__excepthook__(found)
