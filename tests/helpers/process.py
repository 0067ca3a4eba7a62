"""A ``project fit`` in a process of its own, to be killed and resumed; its configuration has the callback ``Brake``."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """``project fit`` in a process of its own, and how far it is."""

    def __init__(self, config: Path, logs: Path) -> None:
        configured = list(logs.glob("killed/version_*/config.yaml"))  # not yet, when it was killed before that
        start = (
            ["--resume", str(logs / "killed")]
            if configured
            else ["--config", str(config), "--trainer.experiment=killed"]
        )
        for steps in logs.glob("killed/version_*/steps.txt"):
            steps.unlink()
        self.logs = logs
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "project", "fit", *start],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, step: int) -> None:
        """Until the optimizer step with this number begins."""
        deadline = time.monotonic() + 120
        while True:
            lines = [line for path in self.logs.glob("killed/version_*/steps.txt") for line in path.read_text().split()]
            if lines and int(lines[-1]) >= step:
                return
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, f"step {step} does not come"
            time.sleep(0.002)

    def kill(self) -> bool:
        """Whether it was still running."""
        self.process.kill()
        _, errors = self.process.communicate()
        assert self.process.returncode in (0, -signal.SIGKILL), errors
        return self.process.returncode != 0

    def finish(self) -> None:
        _, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
