"""Measures how long ``project --help`` and ``project fit --help`` take, relative to importing Lightning's CLI module.

Each round starts the three commands one after the other. Ratios are computed within a round.

    python scripts/benchmark_startup.py --rounds 5
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
    "project --help": ["-m", "project", "--help"],
    "project fit --help": ["-m", "project", "fit", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is started")
    args = parser.parse_args()
    for arguments in COMMANDS.values():
        seconds(arguments)  # one start that is not counted: it fills the page cache
    rounds = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(args.rounds)]
    base = next(iter(COMMANDS))
    for name in COMMANDS:
        times = [one[name] for one in rounds]
        ratios = [one[name] / one[base] for one in rounds]
        spread = f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:30s} {statistics.median(times):5.2f} s  {spread}")  # noqa: T201


if __name__ == "__main__":
    main()
