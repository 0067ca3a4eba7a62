"""The log lines of a running study, and the table at its end."""

import csv
import logging
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from project.frame.paths import write_whole
from project.tuning.plan import Plan

log = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of the trials that count as done."""


def say_trial(study: optuna.Study, trial: FrozenTrial, plan: Plan) -> None:
    """Log one line such as
    ``12/40 trial 14: val/accuracy 0.9861, lr 0.032 (21 s); best 0.9903 of trial 7; 4 min left``.
    """
    trials = study.get_trials(deepcopy=False)
    done = [one for one in trials if one.state in FINISHED]
    text = f"{len(done)}/{len(plan.points)} trial {trial.number}: {result(trial, plan)}, {describe(trial)}"
    text += f" ({seconds(trial):.0f} s)"
    if (best := best_trials(study)) and len(plan.objectives) == 1:
        text += f"; best {best[0].values[0]:.4f} of trial {best[0].number}"
    if len(done) < len(plan.points):
        text += f"; {duration(_seconds_left(trials, plan))} left"
    log.info("%s", text)


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best completed trial; the first one, if several are equal.

    With several objectives: the Pareto front, sorted by the first objective.
    """
    if all(trial.state != TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)):
        return []
    if len(study.directions) == 1:
        return [study.best_trial]
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    unique = {tuple(trial.values): trial for trial in reversed(study.best_trials)}
    return sorted(unique.values(), key=lambda trial: sign * trial.values[0])


def result(trial: FrozenTrial, plan: Plan) -> str:
    """The values of the objectives in words, or why there are none."""
    if "error" in trial.user_attrs:
        return f"not trained ({trial.user_attrs['error']})"
    if trial.state == TrialState.PRUNED:
        return f"pruned after epoch {trial.last_step}"
    return ", ".join(f"{name} {number(value)}" for name, value in zip(plan.objectives, trial.values, strict=True))


def describe(trial: FrozenTrial) -> str:
    """The trial's values, with short names of the keys."""
    names = short_names(list(trial.params))
    return ", ".join(f"{names[key]} {number(value)}" for key, value in trial.params.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each key that no other key has: ``model.optimizer.init_args.lr`` -> ``lr``, or
    ``optimizer.lr`` if another key ends in ``lr`` too.
    """
    parts = {key: [part for part in key.split(".") if part != "init_args"] for key in keys}
    names = {}
    for key, own in parts.items():
        lengths = range(1, len(own) + 1)
        others = [other for name, other in parts.items() if name != key]
        length = next((n for n in lengths if all(other[-n:] != own[-n:] for other in others)), len(own))
        names[key] = ".".join(own[-length:])
    return names


def number(value: Any) -> str:
    """A value as short text, floats with four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 and value == int(value) else f"{value:.4g}"
    return str(short_choice(value))


def short_choice(value: Any) -> Any:
    """``torch.optim.Adam`` -> ``Adam``. Other values do not change."""
    is_path = isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)+", value) is not None
    return value.rpartition(".")[2] if is_path else value


def seconds(trial: FrozenTrial) -> float:
    """The duration of a trial; 0 as long as it is unknown."""
    return trial.duration.total_seconds() if trial.duration else 0.0


def duration(length_s: float) -> str:
    """A duration in words, in seconds, minutes or hours."""
    if length_s < 90:
        return f"{length_s:.0f} s"
    return f"{length_s / 60:.0f} min" if length_s < 5400 else f"{length_s / 3600:.1f} h"


def write_table(study: optuna.Study, plan: Plan, path: Path) -> None:
    """Write a CSV file with a row for each trial: state, objectives, values of the searched keys, seconds and runs."""
    keys = [dimension.key for dimension in plan.space.dimensions]
    columns = ["trial", "state", *plan.objectives, *keys, "seconds", "by_seed", "runs", "error"]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for trial in study.get_trials(deepcopy=False):
                values = trial.values or [None] * len(plan.objectives)
                state = "double" if "double" in trial.user_attrs else _STATES[trial.state]
                row = {"trial": trial.number, "state": state, "seconds": round(seconds(trial), 2)}
                row |= dict(zip(plan.objectives, values, strict=True)) | trial.params
                row |= {name: trial.user_attrs.get(name) for name in ("by_seed", "runs", "error")}
                writer.writerow(row)

    write_whole(path, write)


def show_table(study: optuna.Study, plan: Plan, length: int = 10) -> None:
    """Show the best trials, or the Pareto front, on the terminal."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if len(plan.objectives) > 1:
        trials = best_trials(study)
    else:
        trials.sort(key=lambda trial: trial.values[0], reverse=plan.directions[0] == "maximize")
    keys = [dimension.key for dimension in plan.space.dimensions]
    names = short_names(keys)
    heads = ["trial", *plan.objectives, *(names[key] for key in keys), "seconds"]
    cells = [
        [
            str(trial.number),
            *map(number, trial.values),
            *(number(trial.params.get(key, "")) for key in keys),
            f"{seconds(trial):.0f}",
        ]
        for trial in trials[:length]
    ]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*heads)
        for line in cells:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in [heads, *cells]:
        log.info("%s", "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "lost",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def _seconds_left(trials: Sequence[FrozenTrial], plan: Plan) -> float:
    """The time that the remaining trials will take. It takes the mean time of the finished trials, and assumes that the
    present number of workers goes on.
    """
    lengths = [seconds(trial) for trial in trials if trial.state in FINISHED]
    num_running = sum(trial.state == TrialState.RUNNING for trial in trials) + 1
    return statistics.fmean(lengths) * (len(plan.points) - len(lengths)) / num_running
