"""The data folder, the logs folder, and the files in the folder of one run. All paths of the package are made here.

::

    <data>/                                 Paths().data     PROJECT_DATA_DIR, else ./data
    <logs>/<experiment>/<version>/          Run              PROJECT_LOGS_DIR, else ./logs
        config.yaml  environment.json  metrics.csv  summary.json  events.out.tfevents.*  checkpoints/{best,last}.ckpt
    <cache>/                                Paths().cache    PROJECT_CACHE_DIR, else ~/.cache/project: compiled kernels,
                                                             and which runs are this user's own
"""

import errno
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODEL_FILES = {"onnx": "model.onnx", "onnx-int8": "model_int8.onnx", "pt2": "model.pt2", "packed": "model.packed"}
"""Names of the files that ``project export`` writes, by format."""


class Paths:
    """The folders of data, logs and compiled kernels.

    Example::

        >>> from project.frame import Paths
        >>> run = Paths(logs="runs").new_run("digits")
        >>> run.folder.as_posix(), run.config.name
        ('runs/digits/version_0', 'config.yaml')

    Args:
        data: folder of the data sets; ``None`` takes ``PROJECT_DATA_DIR``, or ``data`` beside the package if that is
            not set.
        logs: folder of all runs; ``None`` takes ``PROJECT_LOGS_DIR``, or ``logs`` beside the package if that is not
            set.
    """

    system_datasets = Path("/usr/share/datasets")
    """The folder in which Linux distributions install data sets, such as Debian's dataset-fashion-mnist."""

    def __init__(self, data: str | os.PathLike[str] | None = None, logs: str | os.PathLike[str] | None = None) -> None:
        self.data = Path(data or os.environ.get("PROJECT_DATA_DIR") or _root() / "data")
        self.logs = Path(logs or os.environ.get("PROJECT_LOGS_DIR") or _root() / "logs")
        self.cache = Path(os.environ.get("PROJECT_CACHE_DIR") or Path.home() / ".cache" / "project")

    def new_run(self, experiment: str) -> "Run":
        """Make the next free folder ``<logs>/<experiment>/version_N``. Two runs never get the same folder.

        Args:
            experiment: name of the folder that holds all runs of one experiment.
        """
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
    """The folder of one run, and the paths of the files in it.

    Example::

        >>> from pathlib import Path
        >>> from project.frame import Run
        >>> run = Run(Path("logs/digits/version_3"))
        >>> run.number, run.best_checkpoint.as_posix()
        (3, 'logs/digits/version_3/checkpoints/best.ckpt')

    Args:
        folder: path of the run's folder; it need not exist.
    """

    folder: Path

    @classmethod
    def find(cls, folder: str | os.PathLike[str], argument: str = "run") -> "Run":
        """The run in ``folder``, or the newest run below it if ``folder`` is that of an experiment.

        Args:
            folder: path of a run's folder, or of an experiment's folder.
            argument: name of the argument that gave the folder, for the error message.

        Raises:
            ValueError: if there is no run in the folder.
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
        """The number N of a folder ``version_N``; -1 for another name."""
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
        """The file that names the fastest of the model files that are accurate enough."""
        return self.folder / "result.json"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.csv"

    def model_file(self, format: str) -> Path:
        """The path to which ``project export`` writes the net.

        Args:
            format: name of the file format: onnx, onnx-int8, pt2 or packed.
        """
        return self.folder / MODEL_FILES[format]

    def benchmark(self, suffix: str) -> Path:
        """The path of a result of ``project benchmark``.

        Args:
            suffix: ending of the file name: csv and md are the table, png is the chart.
        """
        return self.folder / f"benchmark.{suffix}"

    @property
    def model_files(self) -> list[Path]:
        """The exported models that a benchmark runs, sorted by name. A name that begins with a dot is half written."""
        return sorted([*self.folder.glob("[!.]*.onnx"), *self.folder.glob("[!.]*.packed")])

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best_checkpoint(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def best_or_last(self) -> Path:
        """The best checkpoint if there is one, otherwise the last one, which may be missing too."""
        return self.best_checkpoint if self.best_checkpoint.is_file() else self.last_checkpoint

    def weights(self, argument: str = "run") -> Path:
        """The best checkpoint if there is one, otherwise the last one.

        Args:
            argument: name of the argument that gave the run, for the error message.

        Raises:
            ValueError: if the run has no checkpoint.
        """
        path = self.best_or_last
        if not path.is_file():
            raise ValueError(
                f"{argument} is {str(self.folder)!r}, but that run has no checkpoint: train it with `project fit`, or "
                "name another run."
            )
        return path

    def level_checkpoint(self, number: int) -> Path:
        """The best checkpoint of one level of a compression run.

        Args:
            number: level, 0 or more; level 0 is the net before the compression.
        """
        return self.checkpoints / f"level_{number}.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoints / "last.ckpt"


def _root() -> Path:
    """The checkout that holds the package (editable installation), otherwise the working directory."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def _runs(parent: Path) -> list[Run]:
    return [run for folder in parent.glob("version_*") if (run := Run(folder)).number >= 0]


def as_argument(path: Path) -> str:
    """``path`` as a user types it in a shell: relative to the working directory if it is below it, quoted if needed."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def writable(path: Path, remedy: str = "give --output FILE.") -> Path:
    """``path``, where a verb will write a file after its work.

    Args:
        path: path of the file; its folder need not exist.
        remedy: end of the error message: what to do instead.

    Raises:
        ValueError: if no file can be made there.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"{folder} is {'read-only' if folder.is_dir() else 'no folder'}"
        raise ValueError(f"{path} cannot be written, because {reason}: {remedy}")
    return path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: a reader sees the whole old file or the whole new one, also after a power failure.

    Args:
        path: path of the file; its folder is made if it is missing.
        write: function that fills a file beside ``path``, whose path it gets. That file is then renamed to ``path``.

    Raises:
        OSError: if the file cannot be written. The old file is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays at the end, because image writers choose the format by it.
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(part)
        _flush(part)
        part.replace(path)
        if os.name == "posix":
            _flush(path.parent)  # the new name
    except Exception as error:
        if shutil.disk_usage(path.parent).free < 2**16:  # torch and others then raise errors of many kinds
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot wait
            raise
    finally:
        os.close(handle)
