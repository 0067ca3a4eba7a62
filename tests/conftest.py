"""What all tests share: quiet threads, and runs and data in a folder of the test's own."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "--model.net.width=0.25",
    "--data.batch_size=128",
    "--trainer.log_every_n_steps=1",
    "--trainer.observe=false",
]
"""Options that make a run of configs/digits.yaml take a second or two."""


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Images of a few pixels gain nothing from threads; on a busy machine, waiting for each other costs tenfold."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


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
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        out, err = capsys.readouterr()
        return status, out, err

    return run
