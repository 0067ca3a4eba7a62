"""The scripts that train in several processes, started again after they were killed: the bits of a run never stopped.

There is no SLURM here: ``srun`` and ``scontrol`` are stand-ins that start tasks with SLURM's variables and note what
they are asked for. A real scheduler's signals, and what it does to a job that goes back into the queue, are not tested.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.pruning_run import assert_same_runs

from project.frame.paths import Run

pytestmark = pytest.mark.slow

CONFIG = """
trainer:
  max_epochs: 2
  limit_train_batches: 5
  observe: false
  accelerator: cpu
  sync_batchnorm: true
  callbacks+:
    - class_path: project.callbacks.IterativeMagnitudePruning
      init_args:
        schedule: {class_path: project.compression.Iterative, init_args: {fraction: 0.4, rounds: 1}}
        epochs_per_round: 1
        latency: false
    - class_path: project.callbacks.EMA
    - class_path: project.callbacks.Packing
    - class_path: helpers.pruning_run.Brake
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit $?; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$ASKED"
"""


class Job:
    """A script in a process of its own, and how far it is."""

    def __init__(self, tmp_path: Path, script: str, name: str) -> None:
        self.folder = tmp_path / "logs" / name
        for steps in self.folder.glob("version_*/steps.txt"):
            steps.unlink()
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG)
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        for tool, text in {"srun": SRUN, "scontrol": SCONTROL}.items() if script.endswith(".sbatch") else ():
            (tools / tool).write_text(text)
            (tools / tool).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "project", "SLURM_NODELIST": "127.0.0.1"}
        slurm |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "MASTER_PORT": free_port()}
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PROJECT_LOGS_DIR": str(tmp_path / "logs"),
            "OMP_NUM_THREADS": "1",
            "NPROC": "2",
            "ASKED": str(tmp_path / "asked"),
            **(slurm if script.endswith(".sbatch") else {}),
        }
        options = ["--config", "configs/digits.yaml", "--config", str(config), "--model.net.width", "0.25"]
        self.process = subprocess.Popen(
            ["bash", f"scripts/{script}", name, *options],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, step: int) -> None:
        """Until the optimizer step with this number begins."""
        deadline = time.monotonic() + 240
        while True:
            lines = [line for path in self.folder.glob("version_*/steps.txt") for line in path.read_text().split()]
            if lines and int(lines[-1]) >= step:
                return
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"step {step} does not come"
            time.sleep(0.005)

    def kill(self) -> None:
        """The script and all that it has started, which is in sessions of its own."""
        everyone = [self.process.pid]
        for pid in everyone:
            children = Path(f"/proc/{pid}/task/{pid}/children")
            everyone += map(int, children.read_text().split()) if children.is_file() else []
        for pid in everyone:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate()

    def finish(self) -> str:
        out, _ = self.process.communicate(timeout=900)
        assert self.process.returncode == 0, out
        return out

    @property
    def run(self) -> Run:
        (folder,) = self.folder.glob("version_*")
        return Run(folder)


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    job = Job(tmp_path_factory.mktemp("whole"), "train_torchrun.sh", "whole")
    job.finish()
    return job.run


def test_torchrun_goes_on_after_a_kill(tmp_path: Path, whole: Run) -> None:
    for step in (7, 11):
        job = Job(tmp_path, "train_torchrun.sh", "killed")
        job.wait_for(step)
        job.kill()
    assert not job.run.summary.is_file()
    job = Job(tmp_path, "train_torchrun.sh", "killed")
    assert job.finish().count("test accuracy") == 1
    assert_same_runs(job.run, whole)
    assert job.run.metrics.read_text() == whole.metrics.read_text()
    rows = [[line.split(",")[:7] for line in run.report.read_text().splitlines()] for run in (job.run, whole)]
    assert rows[0] == rows[1] and [row[0] for row in rows[0]] == ["step", "dense", "pruned 40.00 %", "packed"]
    assert job.run.model_file("packed").read_bytes() == whole.model_file("packed").read_bytes()
    again = Job(tmp_path, "train_torchrun.sh", "killed")
    assert "is finished" in again.finish() and again.run == job.run


def test_slurm_requeues_and_goes_on(tmp_path: Path, whole: Run) -> None:
    job = Job(tmp_path, "train_slurm.sbatch", "queued")
    job.wait_for(6)
    job.process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B:USR1 does
    deadline = time.monotonic() + 60
    while not (tmp_path / "asked").is_file():
        assert job.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert (tmp_path / "asked").read_text() == "requeue 4242\n"
    assert job.process.poll() is None, "it waits for the end of its processes"
    job.kill()
    job = Job(tmp_path, "train_slurm.sbatch", "queued")
    job.finish()
    assert_same_runs(job.run, whole)
    assert job.run.metrics.read_text() == whole.metrics.read_text()


def test_a_refusal_is_one_sentence_and_predictions_are_in_order(tmp_path: Path, whole: Run) -> None:
    """Of the first process, though each finds the reason; and a run of two processes predicts as one does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PROJECT_LOGS_DIR": str(tmp_path / "logs")}
    devices = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]

    def project(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "project", *args]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
        )

    callback = tmp_path / "low_rank.yaml"
    callback.write_text(
        "trainer:\n  callbacks+:\n    - class_path: project.callbacks.LowRank\n      init_args: {begin_epoch: 1}\n"
    )
    done = project("fit", "--config", "configs/digits.yaml", "--config", str(callback), *devices)
    assert done.returncode == 2 and done.stderr.count("there are 2 processes") == 1, done.stderr
    assert not list((tmp_path / "logs/digits").iterdir())

    tables = []
    for options in (devices, ["--trainer.devices=1", "--trainer.strategy=auto"]):
        output = tmp_path / f"{len(tables)}.csv"
        done = project("predict", "--run", str(whole.folder), f"--output={output}", *options)
        assert done.returncode == 0, done.stderr
        tables.append([line.split(",") for line in output.read_text().splitlines()[1:]])
    assert len(tables[0]) == 359 and [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]]
    assert all(
        abs(float(x) - float(y)) < 1e-4 for a, b in zip(*tables, strict=True) for x, y in zip(a[2:], b[2:], strict=True)
    )
