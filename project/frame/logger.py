"""Where metrics go besides TensorBoard: one CSV file in the run's folder, and log lines on the terminal."""

import csv
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from project.frame.paths import write_whole


class MetricsCSV(Logger):
    """Appends every logged row to ``metrics.csv``; a new metric's column rewrites the file.

    Args:
        path: the file; rows already in it are kept (a resumed run goes on in it).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = ["step"]
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = [{key: value for key, value in row.items() if value} for row in reader]
                self.columns = list(reader.fieldnames or self.columns)

    @property
    def name(self) -> str:
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        return self.path.parent.name

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: hyperparameters stand in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step, **metrics}
        self.rows.append(row)
        new = [key for key in row if key not in self.columns]
        if new or not self.path.is_file():
            self.columns += new
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop the rows after ``step``: a resumed run logs them again."""
        if self.rows:
            self.rows = [row for row in self.rows if int(row["step"]) <= step]
            self._rewrite()

    def _rewrite(self) -> None:
        def write(part: Path) -> None:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)

        write_whole(self.path, write)


class _Stdout(logging.StreamHandler[Any]):
    """Writes to what ``sys.stdout`` is at that moment: progress bars put their own stream in its place."""

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, stream: Any) -> None:
        """Nothing: see above."""


def setup_logging(level: int = logging.INFO) -> None:
    """The package's log lines to standard output, bare, of the first process alone; Lightning's from warnings on."""
    handler = _Stdout()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("project")
    logger.handlers = [handler]
    logger.setLevel(logging.ERROR if rank_zero_only.rank else level)  # type: ignore[attr-defined]
    logger.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*isinstance.*LeafSpec.*")  # Lightning's own call
