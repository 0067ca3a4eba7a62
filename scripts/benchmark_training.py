"""Compares the training speed of ``project fit`` with the usual way of templates and with a loop written by hand.

Each round starts the three programs one after the other, so that a drift of the machine's speed affects all of them
alike. Ratios are computed within a round.

    python scripts/benchmark_training.py --config configs/fashion_mnist.yaml --rounds 5
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def fit(config: str, steps: int) -> float:
    """Images per second of ``project fit``, from its ``summary.json``."""
    with tempfile.TemporaryDirectory() as logs:
        options = ["--trainer.logs_dir", logs, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", str(steps)]
        options += ["--trainer.test_after_fit", "false", "--trainer.limit_val_batches", "0"]
        # The other two programs draw no pictures, so observe is off.
        options += ["--trainer.observe", "false", "--trainer.experiment", "speed"]
        run([sys.executable, "-m", "project", "fit", "--config", config, *options])
        return float(json.loads((Path(logs) / "speed/version_0/summary.json").read_text())["images_per_second"])


def script(name: str, *options: str) -> float:
    """Images per second, as one of the two baseline scripts prints them."""
    output = run([sys.executable, str(HERE / name), *options])
    return float(output.split("images_per_second")[-1].split()[0])


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/fashion_mnist.yaml", help="configuration that all three programs train"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each program is started")
    parser.add_argument("--steps", type=int, default=150, help="number of training steps in each program")
    args = parser.parse_args()
    options = ["--config", args.config, "--steps", str(args.steps)]
    ours, hand, usual = [], [], []
    for index in range(args.rounds):
        ours.append(fit(args.config, args.steps))
        hand.append(script("train_by_hand.py", *options))
        usual.append(script("train_the_usual_way.py", *options))
        print(f"round {index}: fit {ours[-1]:.0f}  by hand {hand[-1]:.0f}  usual {usual[-1]:.0f} images/s", flush=True)  # noqa: T201
    print("median (min to max)")  # noqa: T201
    for name, values in (("project fit", ours), ("by hand", hand), ("usual way", usual)):
        print(f"{name:12s} images/s {spread(values)}")  # noqa: T201
    print(f"fit / usual way       {spread([a / b for a, b in zip(ours, usual, strict=True)])}")  # noqa: T201
    print(f"fit / by hand         {spread([a / b for a, b in zip(ours, hand, strict=True)])}")  # noqa: T201


if __name__ == "__main__":
    main()
