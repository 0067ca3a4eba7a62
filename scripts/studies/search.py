"""Hyperparameter search: grid, random, TPE and Hyperband at equal cost, five repetitions on scikit-learn's digits.

Bergstra & Bengio 2012 (JMLR 13); Bergstra et al. 2011 (TPE); Li et al. 2018 (Hyperband, arXiv:1603.06560). The cost is
the number of training epochs.

    python scripts/studies/search.py
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from evidence import Study, Trained, options
from pages import draw_seeds
from verdicts import Claim, clearly, spread, verdict

EPOCHS = 9
"""Epochs of a trial that is not stopped early."""
OPTIMIZER, LOSS, NET = "model.optimizer.init_args.", "model.loss.init_args.", "model.net.init_args."
GRID: dict[str, Any] = {  # 24 points: the rate matters most, so it gets most values
    f"{OPTIMIZER}lr": {"log_uniform": [1e-3, 3.0], "points": 3},
    f"{OPTIMIZER}momentum": {"uniform": [0.0, 0.99], "points": 2},
    f"{OPTIMIZER}weight_decay": {"log_uniform": [1e-6, 1e-2], "points": 2},
    f"{LOSS}label_smoothing": {"uniform": [0.0, 0.3], "points": 2},
}
SMALL: dict[str, Any] = {
    f"{OPTIMIZER}lr": {"log_uniform": [1e-3, 3.0]},
    f"{OPTIMIZER}momentum": {"uniform": [0.0, 0.99]},
    f"{OPTIMIZER}weight_decay": {"log_uniform": [1e-6, 1e-2]},
    f"{LOSS}label_smoothing": {"uniform": [0.0, 0.3]},
}
LARGE: dict[str, Any] = {
    f"{OPTIMIZER}lr": {"log_uniform": [1e-4, 10.0]},
    f"{OPTIMIZER}momentum": {"uniform": [0.0, 0.99]},
    f"{OPTIMIZER}weight_decay": {"log_uniform": [1e-6, 1.0]},
    f"{LOSS}label_smoothing": {"uniform": [0.0, 0.9]},
    f"{NET}conv_dropout": {"uniform": [0.0, 0.9]},
    f"{NET}fc_dropout": {"uniform": [0.0, 0.9]},
}


@dataclass(frozen=True)
class Setting:
    """A net and the space of its hyperparameters.

    Args:
        arm: first part of the names of its searches' folders.
        net: configuration of the net, as in YAML.
        space: ranges of the hyperparameters.
        trials: number of trials of a search without early stopping; it sets the budget of all searches.
        grid: points of the grid; empty if the setting has no search by grid.
    """

    arm: str
    net: dict[str, Any]
    space: dict[str, Any]
    trials: int
    grid: dict[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """The budget of a search, in epochs of training."""
        return EPOCHS * self.trials

    def methods(self) -> dict[str, dict[str, Any]]:
        """The options of each search, by the name of its method."""
        grid = {"grid": {"space": self.grid, "sampler": "grid"}} if self.grid else {}
        more = {"pruner": "hyperband", "trials": 3 * self.trials}  # as many as the budget allows
        return grid | {
            "random": {"space": self.space, "sampler": "random", "trials": self.trials},
            "TPE": {"space": self.space, "sampler": "tpe", "trials": self.trials},
            "Hyperband": {"space": self.space, "sampler": "random", **more},
        }

    def config(self) -> dict[str, Any]:
        """The configuration of a trial."""
        sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
        return {
            "data": {"class_path": "project.data.Digits", "init_args": {"batch_size": 64, "val_fraction": 0.3}},
            "model": {
                "net": self.net,
                "loss": {"class_path": "project.losses.CrossEntropy"},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": sgd},
                "schedule": {"class_path": "project.learning.Linear"},
            },
            "trainer": {"max_epochs": EPOCHS, "observe": False},
        }


INCEPTION = {"class_path": "project.models.SmallInception", "init_args": {"width": 0.25}}
SETTINGS = {
    "small space": Setting("", INCEPTION, SMALL, 24, GRID),
    "large space": Setting("large_", {"class_path": "plain_nets.ConvThenLinear"}, LARGE, 48),
}
Curves = dict[str, list[list[float]]]
"""The curve of each repetition, by method."""


def best_so_far(trials: Sequence[Trained], epochs: int) -> tuple[list[float], float]:
    """The best validation accuracy after each epoch of training that the search has paid for.

    Args:
        trials: trials in the order in which they were run.
        epochs: budget in epochs of training, 1 or more.

    Returns:
        One accuracy for each epoch of the budget, and the test accuracy of the last net of the best trial.
    """
    curve: list[float] = []
    best, chosen = 0.0, math.nan
    for trial in trials:
        for value in trial.series("val/accuracy")[1] or [0.0]:
            if value > best:
                best, chosen = value, trial.measured() if trial.has("measured.json") else chosen
            curve.append(best)
            if len(curve) == epochs:
                return curve, chosen
    return curve + [best] * (epochs - len(curve)), chosen


def search(study: Study, name: str) -> tuple[Curves, dict[str, list[float]]]:
    """All searches of a setting: the curves and the test accuracies by method, one a repetition."""
    setting = SETTINGS[name]
    methods = setting.methods()
    curves: Curves = {}
    tests: dict[str, list[float]] = {}
    tasks = list(product(methods, study.args.seeds))

    def run(task: tuple[str, int]) -> list[Trained]:
        method, seed = task
        base = {**setting.config(), "seed_everything": seed}
        options = {**methods[method], "search_seed": seed}
        return study.tune(f"{setting.arm}{method}_{seed}", base, options, workers=1)

    with ThreadPoolExecutor(study.args.workers) as pool:
        results = list(pool.map(run, tasks))
    for (method, seed), trials in zip(tasks, results, strict=True):
        curve, test = best_so_far(trials, setting.epochs)
        curves.setdefault(method, []).append([100 * value for value in curve])
        tests.setdefault(method, []).append(test)
        for share in (0.25, 0.5, 1.0):
            epochs = int(share * setting.epochs)
            row = {"setting": name, "method": method, "seed": seed, "epochs": epochs}
            row |= {"best_val_accuracy": curve[epochs - 1], "test_accuracy": test if share == 1 else None}
            study.table.append(row)
    return curves, tests


def decide(study: Study, curves: Mapping[str, Curves]) -> None:
    comparisons = (
        ("random search beats a grid at equal cost", "Bergstra & Bengio 2012, sec. 1, fig. 1", "random", "grid"),
        ("TPE beats random search at equal cost", "Bergstra et al. 2011, sec. 4", "TPE", "random"),
        ("Hyperband beats random search at equal cost", "Li et al. 2018, sec. 4", "Hyperband", "random"),
    )
    for text, source, better, worse in comparisons:
        signs, because = [], []
        for name, of_methods in curves.items():
            if worse not in of_methods:
                continue
            budget = SETTINGS[name].epochs
            half, whole = (
                [at(of_methods[each], epochs) for each in (better, worse)] for epochs in (budget // 2, budget)
            )
            signs += [clearly(*half), clearly(*whole)]
            because.append(
                f"{name}: after half of the budget {spread(half[0])} % against {spread(half[1])}, after all of it"
                f" {spread(whole[0])} against {spread(whole[1])}"
            )
        study.find(Claim(text, source), verdict(signs), f"best validation accuracy, {'; '.join(because)}")


def at(curves: Sequence[Sequence[float]], epochs: int) -> list[float]:
    """The best accuracy of each repetition after so many epochs."""
    return [curve[epochs - 1] for curve in curves]


def show(study: Study, name: str, curves: Curves, tests: Mapping[str, Sequence[float]]) -> None:
    setting = SETTINGS[name]
    study.head(f"Best so far: {name}")
    study.say(
        f"""{setting.epochs} epochs of training for each search: {setting.trials} trials of {EPOCHS} epochs, and as many
        trials as these epochs allow for Hyperband."""
    )
    study.show(["hyperparameter", "range"], [[key, written(ends)] for key, ends in setting.space.items()])
    quarters = [setting.epochs // 4, setting.epochs // 2, setting.epochs]
    study.show(
        ["method", *(f"validation accuracy after {epochs} epochs, %" for epochs in quarters), "test accuracy, %"],
        [
            [method, *(spread(at(rows, epochs)) for epochs in quarters), spread(tests[method], 2, 100)]
            for method, rows in curves.items()
        ],
    )


def written(ends: Mapping[str, Sequence[float]]) -> str:
    """A range as text."""
    ((kind, (low, high)),) = ends.items()
    return f"{low:g} to {high:g}" + (", logarithmic" if kind.startswith("log") else "")


def draw(figure: Any, curves: Mapping[str, Curves]) -> None:
    """Error of the best trial so far against the epochs paid: a panel a setting, logarithmic errors."""
    for axes, (name, of_methods) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for method, rows in of_methods.items():
            errors = [[max(100 - value, 0.1) for value in row] for row in rows]
            color = f"C{['grid', 'random', 'TPE', 'Hyperband'].index(method)}"
            draw_seeds(axes, range(1, len(rows[0]) + 1), errors, method, color)
        axes.set(yscale="log", xlabel="epochs of training", title=name)
        axes.set(ylabel="validation error of the best trial so far (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study("search", "Grid, random, TPE and Hyperband", options(__doc__, arguments, seeds=(0, 1, 2, 3, 4)))
    found = {name: search(study, name) for name in SETTINGS}
    curves = {name: of_methods for name, (of_methods, _) in found.items()}
    decide(study, curves)
    study.head("Two spaces")
    study.say(
        """The small space has four hyperparameters of SmallInception with batch norm, at a quarter of the usual width:
        many of its points are good. The large space has six hyperparameters of a net of two convolutions and a hidden
        linear layer without norm, in wide ranges: few of its points are good. Only the small space has a grid: two
        values of each of six hyperparameters are already 64 points."""
    )
    study.say(
        """Validation has 431 images, the test 359. The test accuracy is that of the trial that a search would choose;
        where Hyperband has stopped the chosen trial early, the number is that of the best trial before it that was not
        stopped."""
    )
    for name, (of_methods, tests) in found.items():
        show(study, name, of_methods, tests)
    study.head("What was scaled down")
    study.say(
        f"""Scikit-learn's digits, small nets, {EPOCHS} epochs a trial. The first 10 trials of TPE are random. The grid
        has the same ends in each dimension as the ranges. A person who knows the problem would choose a narrower one.
        """
    )
    study.write(
        lambda figure: draw(figure, curves),
        f"Validation error of the best trial so far. Thin lines are single repetitions, {len(study.args.seeds)} of each"
        " method, strong lines their means.",
        size=(11.0, 4.4),
    )


if __name__ == "__main__":
    main()
