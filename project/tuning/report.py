"""The files that a study writes into its folder: best.yaml, trials.csv and pictures."""

import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from project.frame.paths import write_whole
from project.frame.plots import round_ticks
from project.tuning.plan import Plan, run_seed
from project.tuning.progress import (
    FINISHED,
    best_trials,
    describe,
    number,
    result,
    short_choice,
    short_names,
    show_table,
    write_table,
)
from project.tuning.trial import trial_config

log = logging.getLogger(__name__)


def publish(study: optuna.Study, plan: Plan, folder: Path) -> None:
    """Write all files, and show the table."""
    write_table(study, plan, folder / "trials.csv")
    best = best_trials(study)
    if not best:
        return
    for trial in best if len(plan.objectives) > 1 else []:
        write_best(trial, plan, folder / f"front_{trial.number}.yaml")
    write_best(best[0], plan, folder / "best.yaml")
    draw(study, plan, folder)
    log.info("")
    show_table(study, plan)


def write_best(trial: FrozenTrial, plan: Plan, path: Path) -> None:
    """Write the whole configuration of a trial's first run. ``project fit`` repeats the run with it."""
    config = plan.space.apply(plan.base, trial.params)
    seed = int(config["seed_everything"] or 0)
    config = trial_config(config, plan, seed)
    own = {name: plan.base["trainer"][name] for name in ("test_after_fit", "enable_progress_bar")}
    config["trainer"] = {**config["trainer"], **own, "experiment": None}
    threads = trial.user_attrs.get("threads", 1)
    lines = [
        f"OMP_NUM_THREADS={threads} project fit --config {path}",
        "",
        f"Trial {trial.number} of study {plan.study}: {result(trial, plan)}; {describe(trial)}.",
    ]
    if plan.seeds > 1:
        figures = "; ".join(", ".join(map(number, values)) for values in trial.user_attrs["by_seed"])
        seeds = ", ".join(str(run_seed(seed, index)) for index in range(plan.seeds))
        lines.append(f"This is the mean of seeds {seeds}: {figures}.")
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    text = head + yaml.safe_dump(config, sort_keys=False)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def draw(study: optuna.Study, plan: Plan, folder: Path) -> None:
    """Draw Optuna's pictures with short names. A picture in which nothing varies is left out."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as pictures

    for index, name in enumerate(plan.objectives):
        suffix = f"_{name.replace('/', '_')}.png" if len(plan.objectives) > 1 else ".png"
        short = for_pictures(study, plan, [index])
        complete = [trial for trial in short.trials if trial.state == TrialState.COMPLETE]
        varied = {key for trial in complete for key in trial.params} if len(complete) > 1 else set()
        always = sorted(key for key in varied if all(key in trial.params for trial in complete))
        _draw(folder / f"history{suffix}", pictures.plot_optimization_history, short, target_name=name)
        if varied:
            _draw(folder / f"slices{suffix}", pictures.plot_slice, short, target_name=name)
            _draw(folder / f"parallel{suffix}", pictures.plot_parallel_coordinate, short, target_name=name)
        if len(always) > 1:  # a key that only some trials have would leave out the others
            importance = pictures.plot_param_importances
            _draw(folder / f"importance{suffix}", importance, short, params=always, target_name=name)
    if 1 < len(plan.objectives) < 4:
        both = for_pictures(study, plan, range(len(plan.objectives)))
        _draw(folder / "front.png", pictures.plot_pareto_front, both, target_names=list(plan.objectives))
    plt.close("all")


def for_pictures(study: optuna.Study, plan: Plan, objectives: Iterable[int]) -> optuna.Study:
    """A copy of the study in memory, with some of its objectives and with names that are short enough for an axis."""
    objectives = list(objectives)
    names = short_names([dimension.key for dimension in plan.space.dimensions])
    copy = optuna.create_study(directions=[plan.directions[index] for index in objectives])
    for trial in study.get_trials():
        if trial.state not in FINISHED:  # a substitute, so that the others keep their numbers
            copy.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
            continue
        values = trial.values and [trial.values[index] for index in objectives]
        copy.add_trial(
            optuna.trial.create_trial(
                state=trial.state,
                values=values,
                params={names[key]: short_choice(value) for key, value in trial.params.items()},
                distributions={names[key]: _short(kind) for key, kind in trial.distributions.items()},
                intermediate_values=trial.intermediate_values,
            )
        )
    return copy


def _short(distribution: BaseDistribution) -> BaseDistribution:
    """The distribution with short names of its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return CategoricalDistribution(list(dict.fromkeys(map(short_choice, distribution.choices))))
    return distribution


def _draw(path: Path, plot: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Write one picture. If Optuna cannot draw it, there is none."""
    import numpy as np
    from matplotlib import pyplot as plt

    with warnings.catch_warnings(), plt.rc_context({"figure.dpi": 110}):
        warnings.simplefilter("ignore")
        try:
            axis = np.ravel(plot(*args, **options))[0]
        except (ValueError, RuntimeError, ZeroDivisionError) as error:  # too few different trials
            log.debug("%s is not drawn: %s", path.name, error)
            return
        if path.name.startswith("parallel"):
            _tidy(axis)
        if path.name.startswith("slices"):
            for other in axis.figure.axes:
                if other.get_xscale() == "log":
                    low, high = other.get_xlim()
                    round_ticks(other, high / low)
                plt.setp(other.get_xticklabels(), rotation=30, ha="right")
        write_whole(path, lambda part: axis.figure.savefig(part, bbox_inches="tight"))
        plt.close(axis.figure)


def _tidy(axis: Any) -> None:
    """Tidy a parallel plot: room for each axis, fewer numbers on logarithmic axes, and the colour bar at the right."""
    from matplotlib.ticker import NullFormatter

    figure = axis.figure
    figure.set_figwidth(2 + 1.8 * (len(figure.axes) - 1))
    for other in figure.axes:
        other.yaxis.set_minor_formatter(NullFormatter())
        if other.get_label() == "<colorbar>":
            place = other.get_position()
            left = axis.get_position().x1 + 0.9 / figure.get_figwidth()
            other.set_position((left, place.y0, place.width, place.height))
