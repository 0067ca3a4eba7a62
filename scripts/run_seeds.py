"""Trains one configuration with several seeds and prints mean and standard deviation of the test accuracy.

    python scripts/run_seeds.py --config configs/digits.yaml --seeds 0 1 2
    python scripts/run_seeds.py --config configs/digits.yaml configs/callbacks/ema.yaml
    python scripts/run_seeds.py --config configs/digits.yaml -- --model.net.width 2

Options after ``--`` are passed to ``project fit``. The runs are written to the logs folder, as by ``project fit``.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from project.frame.paths import Paths, Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", help="configuration to train, and fragments")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each seed")
    parser.add_argument("options", nargs="*", help="more options of project fit, after --")
    args = parser.parse_args()

    experiment = "_".join(Path(config).stem for config in args.config)
    summaries = []
    for seed in args.seeds:
        configs = [word for config in args.config for word in ("--config", config)]
        command = [sys.executable, "-m", "project", "fit", *configs, "--seed_everything", str(seed)]
        experiment_option = ["--trainer.experiment", experiment]
        subprocess.run([*command, *experiment_option, *args.options], check=True, stdout=subprocess.DEVNULL)
        run = Run.find(Paths().logs / experiment)
        summaries.append(json.loads(run.summary.read_text()))
        print(f"seed {seed}: {row(summaries[-1])}  {run.folder}", flush=True)  # noqa: T201
    accuracies = [100 * summary["test/accuracy"] for summary in summaries]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    seconds = [summary["train_seconds"] for summary in summaries]
    print(f"test accuracy {statistics.mean(accuracies):.2f} ± {deviation:.2f} % ({len(accuracies)} seeds), ", end="")  # noqa: T201
    print(f"training {min(seconds):.0f} to {max(seconds):.0f} s, {summaries[0]['num_parameters']:,} parameters")  # noqa: T201


def row(summary: dict[str, float]) -> str:
    test, val = 100 * summary["test/accuracy"], 100 * summary["val/accuracy"]
    speed = f"{summary['train_seconds']:.0f} s, {summary['images_per_second']:.0f} images/s"
    return f"test {test:.2f} %  val {val:.2f} %  {speed}"


if __name__ == "__main__":
    main()
