"""Hyperparameter search: grid, random, TPE and Hyperband at equal cost, five repetitions on scikit-learn's digits.

Bergstra & Bengio 2012 (JMLR 13); Bergstra et al. 2011 (TPE); Li et al. 2018 (Hyperband, arXiv:1603.06560). The cost is
the number of training epochs.

    python scripts/studies/search.py
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

from evidence import Study, Trained, options
from pages import draw_seeds
from verdicts import Claim, clearly, mean, spread, verdict

EPOCHS, TRIALS = 9, 24
RATE, MOMENTUM, DECAY, SMOOTHING = (
    "model.optimizer.init_args.lr",
    "model.optimizer.init_args.momentum",
    "model.optimizer.init_args.weight_decay",
    "model.loss.init_args.label_smoothing",
)
RANGES: dict[str, Any] = {
    RATE: {"log_uniform": [1e-3, 3.0]},
    MOMENTUM: {"uniform": [0.0, 0.99]},
    DECAY: {"log_uniform": [1e-6, 1e-2]},
    SMOOTHING: {"uniform": [0.0, 0.3]},
}
GRID: dict[str, Any] = {  # 24 points: the rate matters most, so it gets most values
    RATE: {"log_uniform": [1e-3, 3.0], "points": 3},
    MOMENTUM: {"uniform": [0.0, 0.99], "points": 2},
    DECAY: {"log_uniform": [1e-6, 1e-2], "points": 2},
    SMOOTHING: {"uniform": [0.0, 0.3], "points": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    "grid": {"space": GRID, "sampler": "grid"},
    "random": {"space": RANGES, "sampler": "random", "trials": TRIALS},
    "TPE": {"space": RANGES, "sampler": "tpe", "trials": TRIALS},
    "Hyperband": {"space": RANGES, "sampler": "random", "pruner": "hyperband", "trials": 3 * TRIALS},
}


def config() -> dict[str, Any]:
    return {
        "data": {"class_path": "project.data.Digits", "init_args": {"batch_size": 64, "val_fraction": 0.3}},
        "model": {
            "net": {"class_path": "project.models.SmallInception", "init_args": {"width": 0.25}},
            "loss": {"class_path": "project.losses.CrossEntropy"},
            "optimizer": {
                "class_path": "torch.optim.SGD",
                "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            },
            "schedule": {"class_path": "project.learning.Linear"},
        },
        "trainer": {"max_epochs": EPOCHS, "observe": False},
    }


def best_so_far(trials: Sequence[Trained]) -> tuple[list[float], float]:
    """The best validation accuracy after each epoch of training that the search has paid for.

    Args:
        trials: trials in the order in which they were run.

    Returns:
        One accuracy for each epoch of the common budget, and the test accuracy of the last net of the best trial.
    """
    curve: list[float] = []
    best, chosen = 0.0, math.nan
    for trial in trials:
        for value in trial.series("val/accuracy")[1] or [0.0]:
            if value > best:
                best, chosen = value, trial.measured() if trial.has("measured.json") else chosen
            curve.append(best)
            if len(curve) == EPOCHS * TRIALS:
                return curve, chosen
    return curve + [best] * (EPOCHS * TRIALS - len(curve)), chosen


def search(study: Study) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """All searches: the curves and the test accuracies by method, one a repetition."""
    curves: dict[str, list[list[float]]] = {}
    tests: dict[str, list[float]] = {}
    tasks = list(product(METHODS, study.args.seeds))

    def run(task: tuple[str, int]) -> list[Trained]:
        method, seed = task
        base = {**config(), "seed_everything": seed}
        return study.tune(f"{method}_{seed}", base, {**METHODS[method], "search_seed": seed}, workers=1)

    with ThreadPoolExecutor(study.args.workers) as pool:
        results = list(pool.map(run, tasks))
    for (method, seed), trials in zip(tasks, results, strict=True):
        curve, test = best_so_far(trials)
        curves.setdefault(method, []).append([100 * value for value in curve])
        tests.setdefault(method, []).append(test)
        for share in (0.25, 0.5, 1.0):
            budget = int(share * EPOCHS * TRIALS)
            row = {"method": method, "seed": seed, "epochs": budget, "best_val_accuracy": curve[budget - 1]}
            study.table.append({**row, "test_accuracy": test if share == 1 else None})
    return curves, tests


def decide(study: Study, curves: dict[str, list[list[float]]], tests: dict[str, list[float]]) -> None:
    whole, half = EPOCHS * TRIALS - 1, EPOCHS * TRIALS // 2 - 1

    def at(method: str, epoch: int) -> list[float]:
        return [curve[epoch] for curve in curves[method]]

    comparisons = (
        ("random search beats a grid at equal cost", "Bergstra & Bengio 2012, sec. 1, fig. 1", "random", "grid"),
        ("TPE beats random search at equal cost", "Bergstra et al. 2011, sec. 4", "TPE", "random"),
        ("Hyperband beats random search at equal cost", "Li et al. 2018, sec. 4", "Hyperband", "random"),
    )
    for text, source, better, worse in comparisons:
        study.find(
            Claim(text, source),
            verdict([clearly(at(better, epoch), at(worse, epoch)) for epoch in (half, whole)]),
            f"""best validation accuracy after half of the budget {spread(at(better, half))} % against
            {spread(at(worse, half))}, after all of it {spread(at(better, whole))} against
            {spread(at(worse, whole))}""",
        )
    study.head("Best so far")
    study.say(
        f"""{EPOCHS * TRIALS} epochs of training for each search: {TRIALS} trials of {EPOCHS} epochs, and as many trials
        as these epochs allow for Hyperband. Validation has 431 images, the test 359.
        The test accuracy is that of the trial that a search would choose; where Hyperband has stopped the chosen trial
        early, the number is that of the best trial before it that was not stopped."""
    )
    quarters = [EPOCHS * TRIALS // 4, half + 1, whole + 1]
    study.show(
        ["method", *(f"validation accuracy after {epochs} epochs, %" for epochs in quarters), "test accuracy, %"],
        [
            [method, *(spread(at(method, epochs - 1)) for epochs in quarters), spread(tests[method], 2, 100)]
            for method in METHODS
        ],
    )


def draw(figure: Any, curves: dict[str, list[list[float]]]) -> None:
    """Error of the best trial so far against the epochs paid, on logarithmic axes."""
    axes = figure.subplots()
    for color, (method, rows) in enumerate(curves.items()):
        errors = [[max(100 - value, 0.1) for value in row] for row in rows]
        draw_seeds(axes, range(1, len(rows[0]) + 1), errors, method, f"C{color}")
    axes.set(yscale="log", xlabel="epochs of training", ylabel="validation error of the best trial so far (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study("search", "Grid, random, TPE and Hyperband", options(__doc__, arguments, seeds=(0, 1, 2, 3, 4)))
    curves, tests = search(study)
    decide(study, curves, tests)
    study.head("What was scaled down")
    study.say(
        f"""A net of a quarter of the usual width, {EPOCHS} epochs a trial, four hyperparameters of which the rate
        matters most. {TRIALS} trials are few for TPE, whose first 10 are random. The grid has the same ends in each
        dimension as the ranges; a person who knows the problem would choose a narrower one."""
    )
    study.write(
        lambda figure: draw(figure, curves),
        f"Validation error of the best trial so far, mean of {len(study.args.seeds)} repetitions. Thin lines are single"
        f" repetitions ({mean([len(rows) for rows in curves.values()]):.0f} of each method).",
        size=(7.0, 4.2),
    )


if __name__ == "__main__":
    main()
