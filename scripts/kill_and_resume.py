"""Kill runs with SIGKILL at random moments, resume them, and compare them with runs that were never stopped.

::

    python scripts/kill_and_resume.py --kills 12

Each configuration of ``scripts/kill_configurations.py`` is trained once without a stop. Then it is trained again and
killed one to three times: at a random time, while it does one of its tasks (a round begins, calibration, packing, …),
before it renames a file, or when a file that it writes has reached a random size. ``project fit --resume`` continues
it after each kill. At the end all checkpoints (weights, averages, masks, codebooks, optimizers), tables and model files
must equal those of the first run. Of numbers, only times may differ.

A kill before the first checkpoint leaves nothing to resume. The run then starts again, and the kill is counted apart.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from kill_configurations import CONFIGURATIONS

MAX_SECONDS = 300.0
"""A process that takes longer hangs."""
TIMES = ("seconds", "latency", "speedup", "engine", "images_per_second")
"""Parts of the names of numbers that are times."""
NOT_COMPARED = ("environment.json", "result.json", ".md", ".png", ".pdf")
"""Endings of files that name the process, or that repeat a table."""


class Event(NamedTuple):
    """A line of a run's notes, as ``scripts/kill_witness.py`` writes them."""

    time: float
    kind: str
    name: str
    size: int


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Args:
        kind: ``write`` and ``rename`` are left to the process itself; ``doing`` is a kill from here.
        name: name of the file, or what the process is doing.
        number: number of the event of this kind and name, counted from 1.
        delay: time from the event to the kill in s, for ``doing``.
        num_bytes: number of bytes that are still written, for ``write``.
    """

    kind: str
    name: str
    number: int = 1
    delay: float = 0.0
    num_bytes: int = 0


@dataclass
class Reference:
    """A run that was never stopped."""

    folder: Path
    events: list[Event]
    end: float


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="number of kills, 1 or more")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument(
        "--configuration", nargs="+", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS), metavar="NAME",
        help=f"configurations, in turn: {', '.join(CONFIGURATIONS)}",
    )  # fmt: skip
    parser.add_argument("--keep", type=Path, default=None, help="folder for the runs that differ")
    options = parser.parse_args(args)
    begin, same, different, early, num_runs = time.perf_counter(), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        names = list(dict.fromkeys(options.configuration))
        references: dict[str, Reference] = {}
        while same + different < options.kills:
            if not names or num_runs > 3 * options.kills + 10:
                say("no configuration can be killed")
                return 1
            name = names[num_runs % len(names)]
            if name not in references:
                if (found := train_reference(name, root)) is None:
                    names.remove(name)
                    continue
                references[name] = found
            reference = references[name]
            chance = random.Random(f"{options.seed} {num_runs}")
            most = min(chance.choice((1, 1, 2, 3)), options.kills - same - different)
            place = root / f"{name}_{num_runs:05}"  # as long as the reference's path, which is part of a checkpoint
            kills, too_early, verdict = kill_and_resume(name, reference, place, chance, most)
            for line in kills:
                say(f"{name:12} {line}  {verdict}")
            num_runs, early = num_runs + 1, early + too_early
            if verdict == "same":
                same += len(kills)
            else:
                different += len(kills)
                if not kills:
                    say(f"{name:12} {verdict}")
                    different += 1
                if options.keep is not None:
                    shutil.copytree(place, options.keep / place.name, dirs_exist_ok=True)
                    shutil.copytree(reference.folder, options.keep / f"{name}_whole", dirs_exist_ok=True)
            shutil.rmtree(place)
    say(
        f"{same + different} kills in {num_runs} runs: {same} the same, {different} different; {early} more before the "
        f"first checkpoint; {time.perf_counter() - begin:.0f} s"
    )
    return min(different, 1)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# -- runs ------------------------------------------------------------------------------------------------------------


def train_reference(name: str, root: Path) -> Reference | None:
    """Train a configuration without a stop; ``None`` if this copy of the package lacks a part of it."""
    place = root / f"{name}_whole"
    (root / f"{name}.yaml").write_text(yaml.safe_dump(CONFIGURATIONS[name]), encoding="utf-8")
    begin = time.monotonic()
    process = Process(["--config", str(root / f"{name}.yaml")], place)
    status = process.wait(None)
    if status:
        last = process.last_line()
        if "which this copy of the package does not have" in last:
            say(f"{name:12} left out: {last}")
            return None
        raise RuntimeError(f"{name}: a run that is not killed ends with status {status}: {last}")
    events = process.events()
    say(f"{name:12} {time.monotonic() - begin:6.2f} s  never stopped")
    return Reference(place, events, time.monotonic())


def kill_and_resume(
    name: str, reference: Reference, place: Path, chance: random.Random, most: int
) -> tuple[list[str], int, str]:
    """Train a configuration, kill it up to ``most`` times, and compare it with the reference.

    Returns:
        A line for each kill, the number of kills before the first checkpoint, and "same" or what differs.
    """
    lines: list[str] = []
    early, seen = 0, Counter[tuple[str, str]]()
    config = str(place.parent / f"{name}.yaml")
    is_begun = False
    while True:
        is_last = len(lines) == most or early > 5
        moment = None if is_last else choose(reference, seen, chance)
        begin = time.monotonic()
        process = Process(["--resume", str(place / "logs/killed")] if is_begun else ["--config", config], place, moment)
        status = process.wait(moment)
        events = process.events()
        if status == 0:
            break
        if status != -signal.SIGKILL:
            return lines, early, f"it ends with status {status}: {process.last_line()}"
        seconds = time.monotonic() - begin
        seen.update((event.kind, event.name) for event in events)
        doing = next((event.name for event in reversed(events) if event.kind == "doing"), "start")
        if moment is not None and moment.kind == "write":
            doing = f"{doing}: {moment.name} at {moment.num_bytes} bytes"
        elif moment is not None and moment.kind == "rename":
            doing = f"{doing}: before {moment.name} is in place"
        line = f"{seconds:6.2f} s  {doing:60} "
        runs = [path.parent for path in (place / "logs").glob("killed/version_*/config.yaml")]
        is_begun = bool(runs)
        for path in (place / "logs").glob("killed/*/checkpoints/[!.]*.ckpt"):
            if isinstance(read(path), str):
                return [*lines, line], early, f"{path.name} is half written"
        where = resumes_at(max(runs)) if runs else None
        if where is None:
            early += 1
            say(f"{name:12} {line} no checkpoint yet, it begins again")
            seen.clear()
        else:
            lines.append(f"{line} resumed from {where}")
    runs = sorted((place / "logs/killed").glob("version_*"))
    wholes = sorted((reference.folder / "logs/killed").glob("version_*"))
    return lines, early, compare(runs[-1], wholes[-1])


def resumes_at(run: Path) -> str | None:
    """The place of a run's last checkpoint, in words; ``None`` without a checkpoint."""
    path = run / "checkpoints/last.ckpt"
    if not path.is_file():
        return None
    content = torch.load(path, map_location="meta", weights_only=True)
    return f"epoch {content['epoch']}, step {content['global_step']}"


def choose(reference: Reference, seen: Counter[tuple[str, str]], chance: random.Random) -> Moment:
    """A random moment of what is left of a run, as far as the events of the reference can tell.

    Args:
        reference: run of the same configuration that was never stopped.
        seen: number of the events of each kind and name before the kills so far; empty before the first kill.
        chance: source of the random numbers.
    """
    events, counts, left = reference.events, Counter[tuple[str, str]](), []
    first = next(index for index, event in enumerate(events) if event[1:3] == ("rename", "last.ckpt"))
    if seen and chance.random() < 0.1:
        return Moment("doing", "start", 1, chance.uniform(0, events[1].time - events[0].time))
    if not seen and chance.random() < 0.05:
        first = 0
    ends = [*[event.time for event in events if event.kind == "doing"][1:], reference.end]
    for index, event in enumerate(events):
        key = (event.kind, event.name)
        counts[key] += 1
        end = ends.pop(0) if event.kind == "doing" else 0.0
        if counts[key] > seen[key] and (seen or index > first):
            left.append((event, counts[key] - seen[key], end - event.time))
    kind = chance.choice(("time", "doing", "write", "rename"))
    found = [item for item in left if item[0].kind == ("doing" if kind == "time" else kind)] or left
    if kind != "time":  # each file and each task has the same chance, however often it comes
        name = chance.choice(sorted({item[0].name for item in found}))
        found = [item for item in found if item[0].name == name]
    weights = [max(item[2], 0.0) + 1e-9 for item in found] if kind == "time" else None
    (event, number, seconds) = chance.choices(found, weights)[0]
    sizes = [each.size for each in events if each.kind == "rename" and each.name == event.name] or [200]
    num_bytes = int(chance.choice((0.0, chance.random(), chance.random(), 1.0)) * max(sizes))
    return Moment(event.kind, event.name, number, chance.uniform(0, max(seconds, 0.0)), num_bytes)


class Process:
    """``project fit`` in a process that is forked from one that has imported everything already.

    Args:
        args: options of the command.
        place: folder of the logs, temporary files and notes.
        moment: moment of the kill, if any.
    """

    def __init__(self, args: list[str], place: Path, moment: Moment | None = None) -> None:
        place.mkdir(exist_ok=True)
        self.notes, self.log = place / "notes.txt", place / "log.txt"
        self.begin = self.notes.stat().st_size if self.notes.is_file() else 0
        target = None
        if moment is not None and moment.kind != "doing":
            target = (moment.kind, moment.name, moment.number, moment.num_bytes)
        self.process = _context().Process(target=_fit, args=(args, place, target))
        self.process.start()

    def events(self) -> list[Event]:
        """The notes of this process."""
        if not self.notes.is_file():
            return []
        with self.notes.open("rb") as file:
            file.seek(self.begin)
            lines = file.read().decode().rpartition("\n")[0].splitlines()  # the last line may be half written
        parts = [line.split("\t") for line in lines]
        return [Event(float(seconds), kind, name, int(size)) for seconds, kind, name, size in parts]

    def wait(self, moment: Moment | None) -> int:
        """Wait for the end of the process, and kill it at the moment if it does not kill itself there.

        Returns:
            The exit status; -9 if the process was killed.
        """
        deadline = time.monotonic() + MAX_SECONDS
        at = deadline
        try:
            while self.process.exitcode is None and time.monotonic() < at:
                if moment is not None and moment.kind == "doing" and at == deadline:
                    found = [event for event in self.events() if (event.kind, event.name) == (moment.kind, moment.name)]
                    if len(found) >= moment.number:
                        at = found[moment.number - 1].time + moment.delay
                self.process.join(0.002)
            hangs = time.monotonic() >= deadline
        finally:
            assert self.process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return 124 if hangs else int(self.process.exitcode or 0)

    def last_line(self) -> str:
        return (self.log.read_text(encoding="utf-8").splitlines() or [""])[-1]


@cache
def _context() -> Any:
    """Starts the process that imports everything and forks the others."""
    folder = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    wanted = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ |= wanted
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_witness"])
    forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _fit(*args: Any) -> None:
    """In the forked process, which has the module already."""
    from kill_witness import fit

    fit(*args)


# -- comparison ------------------------------------------------------------------------------------------------------


def compare(run: Path, whole: Path) -> str:
    """ "same", or the first differences between the files of two runs."""
    found = [
        f"{name} {'is missing' if name in files(whole) else 'is left over'}"
        for name in sorted(files(run).keys() ^ files(whole).keys())
    ]
    for name in sorted(files(run).keys() & files(whole).keys()):
        found += [
            f"{name}: {difference}" for difference in differences(read(files(run)[name]), read(files(whole)[name]))
        ]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "") or "same"


def files(run: Path) -> dict[str, Path]:
    """The files of a run that are compared, by their names below its folder."""
    paths = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith((".", "events.out"))]
    return {str(path.relative_to(run)): path for path in paths if not path.name.endswith(NOT_COMPARED)}


def read(path: Path) -> Any:
    """The content of a file, without times and without the folder of the run."""
    if path.suffix == ".ckpt":
        try:
            return _plain(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            return f"damaged ({type(error).__name__})"
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return _plain(list(csv.DictReader(file)))
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".yaml":
        return path.read_text(encoding="utf-8")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not any(part in str(key) for part in TIMES)}
        return {_plain(str(key)): _plain(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str) and "/logs/killed/" in value:
        return value.partition("/logs/killed/")[2].partition("/")[2]
    return value


def differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """The places where two contents differ by a bit, and the values there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            path = f"{name}.{key}" if name else key
            if key in ours and key in theirs:
                yield from differences(ours[key], theirs[key], path)
            else:
                yield f"{path} is {'missing' if key in theirs else 'left over'}"
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            yield f"{name or 'it'} has {len(ours)} rows, not {len(theirs)}"
        for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
            yield from differences(our, their, f"{name}[{index}]")
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if not _same_bits(ours, theirs):
            yield f"{name} has other values"
    elif ours != theirs and not (ours != ours and theirs != theirs):
        yield f"{name or 'it'} is {str(ours)[:60]!r}, not {str(theirs)[:60]!r}"


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (ours, theirs)))


if __name__ == "__main__":
    sys.exit(main())
