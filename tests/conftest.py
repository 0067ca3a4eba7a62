"""What all tests share: quiet threads, and runs and data in a folder of the test's own."""

import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_run import make_tiny

import project.callbacks
from project.frame.rooms import MissingRoomError, optional

ROOT = Path(__file__).resolve().parents[1]

# Tests start processes, several at the same time. OpenMP's threads would wait in a loop and take the cores from the
# others: two fits at once took four times as long on two cores. So each worker's processes share its part of the cores.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

TINY = [
    "--model.net.width=0.25",
    "--data.batch_size=128",
    "--trainer.log_every_n_steps=1",
    "--trainer.observe=false",
]
"""Options that make a run of configs/digits.yaml take a second or two."""


OF_RESUMES = ("ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists and is not empty")
"""Lightning's warnings about tests that train twice in one folder."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Tests of the whole house and of scripts take minutes: they come first, so that no worker ends with one alone.
    items.sort(key=lambda item: item.path.parent not in (ROOT / "tests", ROOT / "tests/scripts"))
    for item in items:
        if {"callbacks", "compression", "int8", "packed"} & set(item.path.relative_to(ROOT).parts):
            for warning in OF_RESUMES:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of a file go to one worker, except those of test_docs.py: each of its documents may go to another."""
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # it would put files with few tests last, and these take longest
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_every_command_runs" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


# -- tests of rooms that a fork has taken out -------------------------------------------------------------------------


def is_missing_room(error: BaseException) -> bool:
    """Whether an error says that a module of the package is not there, as in a fork without some of the rooms."""
    name = getattr(error, "name", None) or ""
    if isinstance(error, ImportError) and (what := re.match(r"cannot import name '(\w+)'", str(error))):
        try:  # Python made an ImportError of this AttributeError
            getattr(sys.modules.get(name), what[1])
        except AttributeError as reason:
            return isinstance(reason, MissingRoomError)
    return isinstance(error, MissingRoomError) or (
        isinstance(error, ModuleNotFoundError) and name.startswith("project.")
    )


VERBS_OF_ROOMS = ("benchmark", "export", "find_batch_size", "find_lr", "tune")


def has_all_rooms() -> bool:
    """Whether every file is there that defines a public class of a technique, and the other optional rooms."""
    folder = Path(project.__file__).parent
    compression = optional("compression")
    homes = {**project.callbacks._HOMES, **(compression._HOMES if compression else {})}
    files = [folder / f"{home.partition('.')[2].replace('.', '/')}.py" for home in homes.values()]
    rooms = [
        folder / room
        for room in ("compression", "deployment/benchmark", "models/kernels", "models/zoo", "data/sets", "tuning")
    ]
    return all(path.is_file() for path in files) and all(room.is_dir() for room in rooms)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A file that imports what was taken out is skipped."""
    report = yield
    if report.outcome == "failed" and (error := getattr(report.call, "excinfo", None)):
        cause: BaseException | None = error.value
        while cause is not None and not is_missing_room(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {cause}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """A test whose fixture asks for what was taken out is skipped."""
    return (yield from skip_without_room())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that asks for what was taken out is skipped."""
    return (yield from skip_without_room())


def skip_without_room() -> Iterator[None]:
    try:
        return (yield)
    except (MissingRoomError, ImportError, AssertionError) as error:
        cause: BaseException | None = error  # pytest.raises answers another ValueError with an AssertionError
        while cause is not None and not is_missing_room(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            pytest.skip(str(cause))
        raise


# -- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> SimpleNamespace:
    return make_tiny(tmp_path)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Images of a few pixels gain nothing from threads; on a busy machine, waiting for each other costs tenfold."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def same_settings() -> Iterator[None]:
    """A test leaves torch's settings as they were, because the next one in this process would run with them."""

    def settings() -> dict[str, object]:
        return {
            "threads": torch.get_num_threads(),
            "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
            "gradients": torch.is_grad_enabled(),
            "type": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "oneDNN": torch.backends.mkldnn.enabled,
        }

    before = settings()
    yield
    assert settings() == before


@pytest.fixture(scope="session")
def kernels() -> None:
    """Kernels where there is a compiler, which is nearly everywhere; a message where there is none."""
    from project.models.kernels.build import library

    if library(torch.float32) is None:
        pytest.skip("there is no C compiler with OpenMP here, so there are no kernels")


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's runs."""
    monkeypatch.setenv("PROJECT_LOGS_DIR", str(tmp_path / "logs"))
    return tmp_path / "logs"


@pytest.fixture
def digits() -> list[str]:
    """Options of a tiny run on digits."""
    return ["--config", str(ROOT / "configs/digits.yaml"), *TINY]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``command("fit", …)`` runs the console script in this process: exit status, standard output, standard error."""

    def run(*args: str) -> tuple[int, str, str]:
        from project.__main__ import main

        logger = logging.getLogger("project")
        before = (logger.handlers, logger.level, logger.propagate)
        hooks = sys.unraisablehook, threading.excepthook
        levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
        monkeypatch.setattr("sys.argv", ["project", *map(str, args)])
        monkeypatch.setattr("sys.path", [*sys.path])  # the console script adds the working directory
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        finally:
            logger.handlers, logger.level, logger.propagate = before
            sys.unraisablehook, threading.excepthook = hooks
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        out, err = capsys.readouterr()
        of_rooms = [
            "this copy of the package does not have",
            f"not exist: '{ROOT / 'configs'}",
            *(f"subcommand: invalid choice: '{verb}'" for verb in VERBS_OF_ROOMS),
        ]
        wants_missing = any(words in err for words in of_rooms)
        if status and wants_missing and not has_all_rooms():
            pytest.skip(err.strip())
        return status, out, err

    return run
