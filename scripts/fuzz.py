"""Read many damaged files of one format. Each must be refused in one sentence, or be what is written from its answer.

::

    python scripts/fuzz.py packed --inputs 10000

The formats are packed, checkpoint, onnx, idx, cifar, image and yaml. A file is made from a whole one by a change that
depends on the seed and the file's number alone, so ``--first 123 --inputs 1`` makes file 123 again. Each file is read
in another process. It is an error if this process crashes, takes more than 5 seconds of CPU time or 1 GB more memory,
raises anything but a ValueError of one sentence, or gives an answer that does not survive writing and reading.
"""

import argparse
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from fuzz_formats import FORMATS, Format

MAX_SECONDS = 5.0
MAX_BYTES = 1 << 30


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=list(FORMATS), help="format of the files")
    parser.add_argument("--inputs", type=int, default=200, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the files that were read wrongly")
    options = parser.parse_args(args)
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(options.format, options.seed, Path(folder))
        for number in range(options.first, options.first + options.inputs):
            verdict = reader.read(number)
            kind = verdict.partition(":")[0]
            counts[kind] += 1
            if kind not in ("refused", "same"):
                sys.stdout.write(f"{options.format} --seed {options.seed} --first {number} --inputs 1: {verdict}\n")
                sys.stdout.flush()
                if options.keep is not None:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    target = options.keep / f"{options.format}_{options.seed}_{number}{FORMATS[options.format].suffix}"
                    if reader.path.is_file():
                        target.write_bytes(reader.path.read_bytes())
            if number % 500 == 499:
                sys.stdout.write(f"{number + 1} files: {dict(counts)}\n")
                sys.stdout.flush()
        reader.stop()
    wrong = sum(counts.values()) - counts["refused"] - counts["same"]
    seconds = time.perf_counter() - start
    words = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    sys.stdout.write(f"{options.format}: {options.inputs} files in {seconds:.0f} s: {words}; wrong {wrong}\n")
    return min(wrong, 1)


class Reader:
    """Another process that makes and reads files, and is started again when it ends."""

    def __init__(self, format: str, seed: int, folder: Path) -> None:
        self.format, self.seed, self.folder = format, seed, folder
        self.path = folder / f"file{FORMATS[format].suffix}"
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.format, self.seed, self.folder), daemon=True)
        self.process.start()
        other.close()
        if not self.connection.poll(600) or self.connection.recv() != "ready":
            raise RuntimeError("the process that reads files did not start")

    def read(self, number: int) -> str:
        """What became of file ``number``: "refused", "same", or an error and its reason after a colon."""
        start, begun = time.perf_counter(), _cpu_seconds(self.process.pid)
        self.connection.send(number)
        try:
            while not self.connection.poll(0.25):
                waited = time.perf_counter() - start
                if _cpu_seconds(self.process.pid) - begun > MAX_SECONDS or waited > 60 * MAX_SECONDS:
                    self.process.kill()
                    raise TimeoutError
            verdict = str(self.connection.recv())
        except TimeoutError:
            verdict = f"hang: more than {MAX_SECONDS:.0f} s"
        except (EOFError, ConnectionError):
            verdict = "crash: the process ended"
        if verdict.partition(":")[0] in ("hang", "crash", "memory"):
            self.stop()
            self._start()
        return verdict

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _cpu_seconds(pid: int | None) -> float:
    """Seconds of CPU time of a process. Other processes on the machine do not count."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(connection: Connection, format: str, seed: int, folder: Path) -> None:
    """Make, write and read each file whose number comes, and send what became of it."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    files = FORMATS[format](folder)
    path = folder / f"file{files.suffix}"
    path.write_bytes(files.inputs[0])
    verdict = files.check(path)
    if verdict != "same":
        raise RuntimeError(f"a whole file is {verdict}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send("ready")
    while True:
        verdict = read_one(files, seed, connection.recv())
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MAX_BYTES:
            verdict = f"memory: {grown / 1e6:.0f} MB more"
        connection.send(verdict)


def read_one(files: Format, seed: int, number: int) -> str:
    """Make and read one file: "refused", "same", or "error" and its reason after a colon."""
    path = files.folder / f"file{files.suffix}"
    path.write_bytes(files.mutate(random.Random(f"{type(files).__name__} {seed} {number}")))
    try:
        return files.check(path)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"error: {reason} ({Path(place.filename).name}:{place.lineno})"


if __name__ == "__main__":
    sys.exit(main())
