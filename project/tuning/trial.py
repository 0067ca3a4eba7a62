"""One trial: an ordinary run in this process, like one of ``project fit``, but with the trial's values."""

import csv
import gc
import logging
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import optuna
import torch

from project.callbacks.summary import read_summary
from project.frame.cli import CLI
from project.frame.parser import one_sentence
from project.frame.paths import Run
from project.metrics.complexity import count_macs, count_parameters, parameter_bytes
from project.tuning.plan import Plan, run_seed
from project.tuning.report_trial import ReportTrial


def run_trial(trial: optuna.Trial, plan: Plan) -> list[float]:
    """Train the trial's point once with each seed.

    Returns:
        The objectives, as means over the seeds.

    Raises:
        optuna.TrialPruned: if the pruner stops the trial.
        ValueError: if the point cannot be trained.
    """
    params = plan.space.suggest(trial)
    config = plan.space.apply(plan.base, params)
    results, runs = [], []
    for number in range(plan.seeds):
        seed = run_seed(int(config["seed_everything"] or 0), number)
        reporter = ReportTrial(trial if number == 0 else None, plan.objectives[0], plan.pruner != "none")
        run, result = train(trial_config(config, plan, seed), reporter, plan, params)
        results.append(result)
        runs.append(str(run.folder))
        trial.set_user_attr("runs", runs)
        if reporter.pruned:
            raise optuna.TrialPruned
    trial.set_user_attr("by_seed", results)
    trial.set_user_attr("threads", torch.get_num_threads())
    return [statistics.fmean(values) for values in zip(*results, strict=True)]


def trial_config(config: Mapping[str, Any], plan: Plan, seed: int) -> dict[str, Any]:
    """The configuration of one run of a trial. It trains in the same way as the configuration in ``best.yaml``."""
    own = {"experiment": plan.study, "test_after_fit": False, "enable_progress_bar": False}
    return {**config, "seed_everything": seed, "trainer": {**config["trainer"], **own}}


def train(config: dict[str, Any], reporter: ReportTrial, plan: Plan, params: dict[str, Any]) -> tuple[Run, list[float]]:
    """Train one run, and return it with the values of the objectives.

    Raises:
        ValueError: if an objective is NaN, or no validation has measured it.
    """
    with quiet():
        cli = build(config)
        trainer, model = cli.trainer, cli.model
        trainer.searched = {key: str(value) if value is None else value for key, value in params.items()}  # type: ignore[attr-defined]
        trainer.callbacks.append(reporter)  # type: ignore[attr-defined]
        try:
            trainer.fit(model, datamodule=cli.datamodule)
            run: Run = trainer.run  # type: ignore[attr-defined]
            known = {**{name: value.item() for name, value in trainer.callback_metrics.items()}, **reporter.best}
            known |= {name: value for name, value in read_summary(run.summary).items() if name.endswith("_seconds")}
            known |= _costs(model, run, plan)
            for name in plan.objectives:
                if math.isnan(known.get(name, math.nan)):
                    raise ValueError(f"{name} is {known.get(name, 'missing')}, so the trial has no result")
            return run, [float(known[name]) for name in plan.objectives]
        finally:
            del cli, trainer, model  # free the memory before the next trial's net is made
            gc.collect()


def build(config: dict[str, Any]) -> CLI:
    """Build classifier, data module and trainer from a configuration.

    Raises:
        ValueError: if the parser refuses the configuration.
    """
    try:
        return CLI(deepcopy(config), run=False)  # a copy, because the parser changes its input
    except SystemExit:
        raise ValueError("the parser refuses the configuration of this trial: see the line above.") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the log lines of a single run, because a study has its own."""
    logger = logging.getLogger("project")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def sentence(error: BaseException) -> str:
    """An exception as one line of text."""
    return one_sentence(str(error)) or type(error).__name__


def _costs(model: Any, run: Run, plan: Plan) -> dict[str, float]:
    """Parameters, bytes and, if it is an objective, multiply-accumulates of the trained net."""
    costs: dict[str, float] = {"num_parameters": count_parameters(model.net), "bytes": parameter_bytes(model.net)}
    if run.report.is_file():  # a compression wrote a file: its bytes count
        with run.report.open(newline="", encoding="utf-8") as file:
            sizes = [int(row["file_bytes"]) for row in csv.DictReader(file) if row["file_bytes"]]
        costs |= {"bytes": sizes[-1]} if sizes else {}
    if "macs" in plan.objectives:
        costs["macs"] = count_macs(model.net, model.image_shape)
    return costs
