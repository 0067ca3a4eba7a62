"""A PostgreSQL server of a test's own: on a socket in a folder, gone afterwards."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PLACES = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a fresh, empty database; the test is skipped where no server can be started."""
    pytest.importorskip("psycopg", reason="the driver is missing: pip install -e '.[postgres]'")
    initdb, pg_ctl = (shutil.which(name, path=os.pathsep.join(_PLACES)) for name in ("initdb", "pg_ctl"))
    if initdb is None or pg_ctl is None:
        pytest.skip("there is no PostgreSQL server here: apt-get install postgresql")
    root = os.geteuid() == 0  # as whom the server refuses to run
    folder = Path(tempfile.mkdtemp(prefix="study_", dir="/tmp"))
    options = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    try:
        if root:
            shutil.chown(folder, "postgres")
            options["user"] = "postgres"
        subprocess.run([initdb, "-D", folder / "data", "-U", "postgres", "-A", "trust"], **options)
        server = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        control = [pg_ctl, "-D", folder / "data", "-w"]
        subprocess.run([*control, "-o", server, "-l", folder / "log", "start"], **options)
    except (OSError, LookupError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"PostgreSQL does not start here: {error}")
    try:
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **{**options, "check": False})
        shutil.rmtree(folder, ignore_errors=True)
