"""Many processes on one study, some of them killed: every trial exactly once, in a file and in a database."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from helpers.postgres import postgres

from project.frame.rooms import needed

needed("models.zoo.lenet", "LeNet300100")  # the net of these studies, which trains in a moment
ROOT = Path(__file__).resolve().parents[2]
NUM_TRIALS = 40
TINY = {
    "model": {"net": "project.models.LeNet300100"},
    "trainer": {
        "max_epochs": 1,
        "limit_train_batches": 2,
        "observe": False,
        "logger": False,
        "enable_checkpointing": False,
    },
}
RANDOM = {"model.optimizer.init_args.lr": {"log_uniform": [0.01, 0.5]}, "data.init_args.batch_size": [64, 128]}
GRID = {"model.optimizer.init_args.lr": {"log_uniform": [0.01, 0.5], "points": 8}, "seed_everything": [0, 1, 2, 3, 4]}

pytestmark = pytest.mark.slow


@pytest.fixture
def tune(tmp_path: Path, logs: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start ``project tune`` on the study ``s`` with 2 or 4 workers; what is still alive at the end is killed."""
    started = []

    def start(space: dict, *options: str) -> subprocess.Popen:
        file = tmp_path / "space.yaml"
        file.write_text(yaml.safe_dump({**TINY, "space": space, "trials": NUM_TRIALS, "heartbeat_s": 2}))
        command = [sys.executable, "-m", "project", "tune", "--config", str(ROOT / "configs/digits.yaml")]
        command += ["--config", str(file), "--study", "s", *options]
        with (tmp_path / f"log_{len(started)}").open("w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_runs(logs: Path, count: int) -> None:
    """Until this many trials have begun."""
    limit = time.time() + 500
    while len(list((logs / "s").glob("version_*"))) < count:
        assert time.time() < limit, "the trials do not begin"
        time.sleep(0.05)


def check_all_once(logs: Path, num_lost: int = 0) -> list[dict[str, str]]:
    """40 finished trials, 40 finished runs; of those that were lost at most ``num_lost``."""
    with (logs / "s" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    states = Counter(row["state"] for row in rows)
    assert states["complete"] == NUM_TRIALS and states["lost"] <= num_lost, states
    assert set(states) <= {"complete", "lost", "double"}  # two may put a lost ticket in at once
    finished = [folder for folder in (logs / "s").glob("version_*") if (folder / "summary.json").is_file()]
    named = [folder for row in rows if row["state"] == "complete" for folder in yaml.safe_load(row["runs"])]
    assert len(set(named)) == NUM_TRIALS and set(named) <= set(map(str, finished))
    assert len(finished) <= NUM_TRIALS + num_lost  # a process may die between a run's end and its telling
    return [row for row in rows if row["state"] == "complete"]


@pytest.mark.parametrize("place", ["file", "postgres"])
def test_four_workers_and_two_kills(place, tune, logs):
    with postgres() if place == "postgres" else nullcontext() as url:
        options = ["--sampler", "random", "--workers", "4", *(["--storage", url] if url else [])]
        process = tune(RANDOM, *options)
        wait_for_runs(logs, 10)
        victims = workers(process)
        assert len(victims) == 4
        for victim in victims[:2]:
            os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=900) == 0
        rows = check_all_once(logs, num_lost=2)
        assert len({row["model.optimizer.init_args.lr"] for row in rows}) == NUM_TRIALS, "no point is drawn twice"


def test_a_grid_has_each_point_once_though_all_processes_are_killed(tune, logs):
    options = ["--sampler", "grid", "--workers", "3"]
    first = tune(GRID, *options)
    wait_for_runs(logs, 12)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    second, third = tune(GRID, *options), tune(GRID, "--sampler", "grid")  # two commands at once go on with it
    assert second.wait(timeout=900) == 0 and third.wait(timeout=300) == 0
    rows = check_all_once(logs, num_lost=3)
    points = {(row["model.optimizer.init_args.lr"], row["seed_everything"]) for row in rows}
    assert len(points) == NUM_TRIALS
