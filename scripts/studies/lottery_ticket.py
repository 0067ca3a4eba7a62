"""Lottery tickets and their controls: accuracy against the share of weights left, several seeds; a table and a picture.

Frankle & Carbin 2019 (arXiv:1803.03635, fig. 4 and 5) for winning tickets, random reinitialisation and random masks;
Renda et al. 2020 (arXiv:2003.02389) for rewinding the rate; Han et al. 2015 (arXiv:1506.02626) for fine-tuning.

    python scripts/studies/lottery_ticket.py --seeds 0 1 2 3 4 --jobs 2

Runs land in the logs folder, one experiment an arm; what is finished is not run again.
Writes lottery_ticket.csv, .png and a table of the papers' levels into the output folder.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from project.compression.report_rows import read_report
from project.frame.paths import Paths, Run

CALLBACK = "--trainer.callbacks"
ARMS = {
    "winning ticket": [],
    "random reinitialisation": [f"{CALLBACK}.after=reinit"],
    "random masks": [f"{CALLBACK}.pruner.init_args.criterion=random"],
    "learning-rate rewinding": [f"{CALLBACK}.after=rewind_lr"],
    "fine-tuning": [f"{CALLBACK}.after=finetune"],
}
SHOWN = (51.3, 21.1, 13.5, 3.6, 1.9, 1.2)
"""Percent of weights left in the paper's figures."""


def fit(arm: str, seed: int, config: str, options: list[str]) -> Run:
    """The finished run of an arm and a seed, trained if it is not there."""
    experiment = f"{Path(config).stem}/{arm.replace(' ', '_')}/seed_{seed}"
    done = [Run(folder) for folder in sorted((Paths().logs / experiment).glob("version_*"))]
    finished = [run for run in done if (run.folder / "report.csv").is_file()]
    if not finished:
        command = [sys.executable, "-m", "project", "fit", "--config", config, "--seed_everything", str(seed)]
        command += ["--trainer.experiment", experiment, "--trainer.test_after_fit", "false", *ARMS[arm], *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finished = [Run.find(Paths().logs / experiment)]
        print(f"{arm}, seed {seed}: done", flush=True)  # noqa: T201
    return finished[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/lottery_ticket.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="an existing folder")
    parser.add_argument("options", nargs="*", help="further options of project fit, after --")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    tasks = [(arm, seed) for seed in args.seeds for arm in ARMS]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda task: fit(task[0], task[1], args.config, args.options), tasks))
    accuracies: dict[tuple[str, float], list[float]] = defaultdict(list)
    for (arm, _), run in zip(tasks, runs, strict=True):
        for row in read_report(run.folder / "report.csv"):
            left = round(100 * (1 - (row.sparsity or 0)), 1)
            accuracies[arm, left].append(100 * (row.test_accuracy or 0))
    write(accuracies, args.output, len(args.seeds))


def write(accuracies: dict[tuple[str, float], list[float]], folder: Path, num_seeds: int) -> None:
    levels = sorted({left for _, left in accuracies}, reverse=True)
    with (folder / "lottery_ticket.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "percent_left", "test_accuracy_mean", "test_accuracy_sd", "num_seeds"])
        for (arm, left), values in sorted(
            accuracies.items(), key=lambda item: (list(ARMS).index(item[0][0]), -item[0][1])
        ):
            writer.writerow([arm, left, f"{statistics.mean(values):.3f}", f"{deviation(values):.3f}", len(values)])
    shown = [min(levels, key=lambda level: abs(level - wanted)) for wanted in (100.0, *SHOWN)]
    lines = ["| weights left | " + " | ".join(f"{level:.1f} %" for level in shown) + " |"]
    lines.append("|---|" + "---:|" * len(shown))
    for arm in ARMS:
        cells = [accuracies[arm, level] for level in shown]
        lines.append(f"| {arm} | " + " | ".join(f"{statistics.mean(c):.2f} ± {deviation(c):.2f}" for c in cells) + " |")
    (folder / "lottery_ticket_table.md").write_text("\n".join(lines) + "\n")
    draw(accuracies, levels, folder / "lottery_ticket.png", num_seeds)


def draw(accuracies: dict[tuple[str, float], list[float]], levels: list[float], path: Path, num_seeds: int) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=110)
    for arm in ARMS:
        means = [statistics.mean(accuracies[arm, level]) for level in levels]
        errors = [deviation(accuracies[arm, level]) for level in levels]
        axes.errorbar(levels, means, errors, label=arm, marker="o", markersize=3, linewidth=1.2, capsize=2)
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = [100.0, *SHOWN]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("weights left (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"LeNet-300-100 on Fashion-MNIST, mean ± sd of {num_seeds} seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
