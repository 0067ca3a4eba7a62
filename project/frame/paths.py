"""Where things live: the data folder, the logs folder, and the folder of one run. Nothing else builds paths.

::

    <data>/                                 Paths().data     PROJECT_DATA_DIR, else ./data
    <logs>/<experiment>/<version>/          Run              PROJECT_LOGS_DIR, else ./logs
        config.yaml  environment.json  metrics.csv  summary.json  events.out.tfevents.*  checkpoints/{best,last}.ckpt
    <cache>/                                Paths().cache    PROJECT_CACHE_DIR, else ~/.cache/project: compiled kernels
"""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODEL_FILES = {"onnx": "model.onnx", "onnx-int8": "model_int8.onnx", "pt2": "model.pt2", "packed": "model.packed"}
"""Names of the files that ``project export`` writes, by format."""


class Paths:
    """The data and logs folders.

    Args:
        data: folder of the data sets; ``None`` takes ``PROJECT_DATA_DIR``, else ``data`` beside the package's checkout.
        logs: folder of all runs; ``None`` takes ``PROJECT_LOGS_DIR``, else ``logs`` likewise.
    """

    system_datasets = Path("/usr/share/datasets")
    """Where Linux distributions install data sets (Debian's dataset-fashion-mnist does)."""

    def __init__(self, data: str | os.PathLike[str] | None = None, logs: str | os.PathLike[str] | None = None) -> None:
        self.data = Path(data or os.environ.get("PROJECT_DATA_DIR") or _root() / "data")
        self.logs = Path(logs or os.environ.get("PROJECT_LOGS_DIR") or _root() / "logs")
        self.cache = Path(os.environ.get("PROJECT_CACHE_DIR") or Path.home() / ".cache" / "project")

    def new_run(self, experiment: str) -> "Run":
        """The next free folder ``<logs>/<experiment>/version_N``; made at once, so that two runs never share one."""
        parent = self.logs / experiment
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((run.number for run in _runs(parent)), default=-1)
        while True:
            try:
                (parent / f"version_{number}").mkdir()
            except FileExistsError:
                number += 1
            else:
                return Run(parent / f"version_{number}")


@dataclass(frozen=True)
class Run:
    """The folder of one run and what lies in it."""

    folder: Path

    @classmethod
    def find(cls, folder: str | os.PathLike[str], argument: str = "run") -> "Run":
        """The run in ``folder``, or the newest one below it when ``folder`` is an experiment.

        Raises:
            ValueError: when there is no run; it names the ``argument`` that gave the folder.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(
                f"{argument} is {str(path)!r}, but there is no such folder: name a run's folder below logs/."
            )
        if (path / "config.yaml").is_file():
            return cls(path)
        runs = [run for run in _runs(path) if run.config.is_file()]
        if not runs:
            raise ValueError(
                f"{argument} is {str(path)!r}, but neither it nor a version_* folder in it holds a config.yaml: "
                "name a run's folder, as `project fit` printed it."
            )
        return max(runs, key=lambda run: run.number)

    @property
    def number(self) -> int:
        """N of ``version_N``; -1 for another name."""
        suffix = self.folder.name.removeprefix("version_")
        return int(suffix) if suffix.isdigit() else -1

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.folder / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.csv"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.csv"

    @property
    def result(self) -> Path:
        """Which model file is the fastest of those that are accurate enough."""
        return self.folder / "result.json"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.csv"

    def model_file(self, format: str) -> Path:
        """Where ``project export`` writes the net in a format."""
        return self.folder / MODEL_FILES[format]

    def benchmark(self, suffix: str) -> Path:
        """Of ``project benchmark``: the table (``csv``, ``md``) and the picture (``png``)."""
        return self.folder / f"benchmark.{suffix}"

    @property
    def model_files(self) -> list[Path]:
        """Exported models that a benchmark runs, by name."""
        return sorted([*self.folder.glob("*.onnx"), *self.folder.glob("*.packed")])

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def best_or_last(self) -> Path:
        """The best checkpoint where there is one, else the last, which may be missing too."""
        return self.best_checkpoint if self.best_checkpoint.is_file() else self.last_checkpoint

    def weights(self, argument: str = "run") -> Path:
        """The best checkpoint, else the last.

        Args:
            argument: that named the run, for the error.

        Raises:
            ValueError: when there is neither.
        """
        path = self.best_or_last
        if not path.is_file():
            raise ValueError(
                f"{argument} is {str(self.folder)!r}, but that run has no checkpoint: train it with `project fit`, or "
                "name another run."
            )
        return path

    def level_checkpoint(self, number: int) -> Path:
        """The best of one level of a compression run; level 0 is the net before it."""
        return self.checkpoints / f"level_{number}.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "last.ckpt"


def _root() -> Path:
    """The checkout that holds the package (editable install), else the working directory."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def _runs(parent: Path) -> list[Run]:
    return [run for folder in parent.glob("version_*") if (run := Run(folder)).number >= 0]


def as_argument(path: Path) -> str:
    """``path`` as one types it in a shell: from the working directory if it lies below it, quoted if it must be."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: a reader sees the old file or the new one, never a
    half.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix stays last: image writers go by it
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
