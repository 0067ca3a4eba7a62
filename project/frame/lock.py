"""The lock of a run's folder: only one process at a time trains a run."""

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

PATIENCE_S = 7
"""Seconds to wait for a lock: the workers of a loader hold it for up to 5 s after their process was killed."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context in which this process alone trains the run in ``folder``. The kernel frees the lock if it is killed.

    Args:
        folder: folder of the run.

    Raises:
        ValueError: if another process holds the lock.
    """
    file = None if fcntl is None else _lock(folder)
    try:
        yield
    finally:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_UN)  # forked processes have the same lock
            file.close()


def _lock(folder: Path) -> FileIO | None:
    deadline, file = time.monotonic() + PATIENCE_S, None
    try:
        file = FileIO(folder / ".lock", "a+")
        while not _is_free(file):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().decode() or "another process"
                file.close()
                raise ValueError(
                    f"{folder} is being trained by {holder}: wait for its end or stop it, or start a new run."
                )
            time.sleep(0.1)
    except OSError as error:
        if file is not None:
            file.close()
        log.warning("%s cannot be locked (%s): take care that no other process trains this run.", folder, error)
        return None
    with suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
    return file


def _is_free(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
