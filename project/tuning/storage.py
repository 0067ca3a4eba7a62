"""Where a study is stored: in a file for the processes of one machine, or in a database for several machines.

The file is Optuna's journal (Akiba et al. 2019, arXiv:1907.10902, sec. 3 for studies that many processes work on).
Processes append to it under a lock that also works on NFS. Optuna finds dead processes by their heartbeats, but only in
databases. Here the journal has heartbeats too. So with both storages, a trial whose process is killed goes to another
process.
"""

import os
import warnings
from pathlib import Path

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

DEAD_AFTER = 4
"""Number of heartbeats that a process may miss before it counts as dead."""
_LOCK_S = 10
"""Seconds after which a lock counts as left by a dead process. A living process holds it for milliseconds."""


class HeartbeatJournal(JournalStorage, BaseHeartbeat):
    """A journal with heartbeats: each running trial has a file beside it whose time of change is the heartbeat.

    These times are compared with that of a file that is changed just now. On NFS all of them come from the server's
    clock.

    Args:
        path: path of the journal.
        heartbeat_s: number of seconds between two heartbeats; 1 or more.
    """

    def __init__(self, path: Path, heartbeat_s: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(JournalFileBackend(str(path), JournalFileSymlinkLock(str(path), _LOCK_S)))
        self._folder = path.with_name(f"{path.name}.alive")
        self._folder.mkdir(exist_ok=True)
        self._heartbeat_s = heartbeat_s

    def record_heartbeat(self, trial_id: int) -> None:
        _touch(self._folder / str(trial_id))

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        now = _touch(self._folder / f"now_{os.getpid()}")
        files = {trial._trial_id: self._folder / str(trial._trial_id) for trial in running}
        beats = {number: path.stat().st_mtime if path.exists() else _touch(path) for number, path in files.items()}
        return [number for number, beat in beats.items() if now - beat > DEAD_AFTER * self._heartbeat_s]

    def get_heartbeat_interval(self) -> int:
        return self._heartbeat_s

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None


def open_storage(url: str, heartbeat_s: int) -> BaseStorage:
    """The storage at a path or URL. ``optuna.load_study`` takes it.

    Args:
        url: path of a file, or a URL: ``file://…``, ``postgresql://user@host/name``, ``mysql://…``, ``sqlite:///…``.
        heartbeat_s: number of seconds between two heartbeats of a running trial; 1 or more.

    Raises:
        ValueError: if the database does not answer, or its driver is not installed.
    """
    if "://" not in url or url.startswith("file://"):
        return HeartbeatJournal(Path(url.removeprefix("file://")), heartbeat_s)
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    try:
        shown = make_url(url).render_as_string(hide_password=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            for attempt in range(3):
                try:
                    return _database(url, heartbeat_s)
                except DBAPIError:  # another process has made the tables at the same moment
                    if attempt == 2:
                        raise
    except ImportError:
        raise ValueError(
            f"storage is {shown!r}, but no driver for it is installed: run pip install -e '.[postgres]', or install "
            "the driver that the URL names, such as mysql+pymysql://."
        ) from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise ValueError(
            f"storage is {url.split('://')[0]}://…, but the database refuses: {reason}: check the URL and the database."
        ) from None
    raise AssertionError("unreachable")


def _database(url: str, heartbeat_s: int) -> RDBStorage:
    if url.startswith("postgresql://"):
        url = url.replace("://", "+psycopg://", 1)  # the driver of the extra `postgres`
    grace_period = DEAD_AFTER * heartbeat_s
    return RDBStorage(url, heartbeat_interval=heartbeat_s, grace_period=grace_period)


def _touch(path: Path) -> float:
    """Set a file's time of change to now, and return it in seconds."""
    path.touch()
    return path.stat().st_mtime
