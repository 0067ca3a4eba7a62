"""``project tune``: check the space, open the study, let workers train trials, and report.

Hyperparameter search with Optuna (Akiba et al. 2019, arXiv:1907.10902). The same command begins a study and continues
it. With a storage that several machines reach, it also joins the study from another machine.
"""

import json
import logging
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from project.frame.parser import Parser, one_sentence
from project.frame.paths import Paths, as_argument
from project.tuning.plan import Plan, check_objectives
from project.tuning.progress import FINISHED, best_trials, duration
from project.tuning.report import publish
from project.tuning.trial import build, quiet
from project.tuning.work import fill, open_study, work
from project.tuning.workers import GONE, work_in_processes

log = logging.getLogger(__name__)

_OF_THE_MACHINE = ("logs_dir", "data_dir", "root", "num_workers", "accelerator", "devices", "default_root_dir")
"""Keys of the configuration that may differ between the machines that work on one study."""


def tune(
    base: dict[str, Any],
    space: dict[str, Any],
    *,
    study: str,
    objective: str | list[str] = "val/accuracy",
    sampler: str = "tpe",
    pruner: str = "none",
    trials: int | None = None,
    baseline: bool = False,
    seeds: int = 1,
    workers: int = 1,
    budget_s: float | None = None,
    storage: str | None = None,
    search_seed: int = 0,
    heartbeat_s: int = 15,
) -> optuna.Study:
    """Search, and write a table, the best configuration and pictures into ``<logs>/<study>``.

    The command line calls it as :meth:`project.frame.verbs.Trainer.tune`.

    Args:
        base: resolved configuration of a run, whose values the trials change.
        space: dotted keys of the configuration and their values (:mod:`project.tuning.space`).
        study: name of the study, and of its folder below the logs.
        objective: logged validation metric (its best epoch counts), macs, bytes, num_parameters, train_seconds or
            fit_seconds. Several names make a Pareto front.
        sampler: name of the sampler: grid, random, tpe or cma-es.
        pruner: name of the pruner: none, median or hyperband.
        trials: number of trials of the whole study; 1 or more. ``None`` takes every point of a grid, or 30 for another
            sampler.
        baseline: whether the first trial is the base configuration without changes.
        seeds: number of runs of each trial; 1 or more. The objective is their mean.
        workers: number of processes on this machine; 1 or more.
        budget_s: seconds after which this call begins no further trial; 0 or more. ``None`` for no limit.
        storage: URL of a database, or path of a file. ``None`` takes a file in the study's folder.
        search_seed: seed of the sampler; any int.
        heartbeat_s: number of seconds between two signs of life of a running trial; 1 or more. A trial that misses four
            of them is given to another process.

    Returns:
        Optuna's study.

    Raises:
        ValueError: if an argument is outside its range, or the configuration does not take a key or a value of the
            space. This is checked before the first trial.
        KeyboardInterrupt, SystemExit: if a signal has stopped the search. The tables are written before.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: choose 1 or more.")
    folder = Paths(logs=base["trainer"]["logs_dir"]).logs / study
    plan = Plan(
        base=_one_device(base),
        spec=space,
        objectives=(objective,) if isinstance(objective, str) else tuple(objective),
        sampler=sampler,
        pruner=pruner,
        trials=trials,
        baseline=baseline,
        seeds=seeds,
        study=study,
        storage=storage or str(folder / "study.journal"),
        search_seed=search_seed,
        heartbeat_s=heartbeat_s,
        deadline=None if budget_s is None else time.time() + budget_s,
    )
    check_space(plan)
    joined = open_study(plan)
    begin(joined, plan)
    stopped: BaseException | None = None
    try:
        if _is_unfinished(joined, plan):
            if workers == 1:
                work(plan)
            else:
                work_in_processes(plan, workers)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning turns Ctrl-C into SystemExit
        log.info("stopped: the same command continues study %s", study)
        stopped = error
    except StorageInternalError:
        raise ValueError(GONE) from None
    publish(joined, plan, folder)
    _say_end(joined, plan, folder)
    if stopped is not None:
        raise stopped
    return joined


def check_space(plan: Plan) -> None:
    """Check that the parser accepts every choice and both ends of every range.

    Raises:
        ValueError: if the configuration does not take a key or a value.
    """
    plan.space.check_keys(plan.base)
    plan.make_pruner()
    plan.points  # noqa: B018  (an error if a grid has too many points)
    with quiet():
        parser = build(plan.base).parser
    parser.exit_on_error = False
    before: dict[str, Any] = {}
    for params in plan.space.probes():
        try:
            parser.parse_object(deepcopy(plan.space.apply(plan.base, params)))
        except Exception as error:  # jsonargparse raises several classes
            changed = [key for key in params if key not in before or before[key] != params[key]]
            where = f"{changed[0]} is {params[changed[0]]!r}" if before and changed else "its first point is refused"
            near = parser._nearest(str(error)) if isinstance(parser, Parser) else None
            hint = f" Did you mean {near!r}?" if near else ""
            raise ValueError(f"space: {where}: {one_sentence(str(error)).rstrip('.')}.{hint}") from None
        before = before or params


def begin(study: optuna.Study, plan: Plan) -> None:
    """Note the definition of a new study, or compare it with that of an existing one. Then queue the missing trials.

    Raises:
        ValueError: if the existing study has another definition, or no run logs an objective.
    """
    wanted = {"base": plan.base, "space": plan.spec, "objective": list(plan.objectives), "seeds": plan.seeds}
    noted = study.user_attrs.get("definition")
    if noted is None:
        check_objectives(plan.objectives, logged_metrics(plan))
        study.set_user_attr("definition", json.dumps(wanted))
    elif (key := _difference(json.loads(noted), json.loads(json.dumps(wanted)))) is not None:
        raise ValueError(
            f"study is {plan.study!r}, which was begun with another {key}: repeat the command that began it, or name "
            "another study (--study NAME)."
        )
    fill(study, plan)
    trials = study.get_trials(deepcopy=False)
    num_done = sum(trial.state in FINISHED for trial in trials)
    num_running = sum(trial.state == TrialState.RUNNING for trial in trials)
    log.info("study %s: %d of %d trials done%s", plan.study, num_done, len(plan.points), _running(num_running))


def logged_metrics(plan: Plan) -> list[str]:
    """The names of the metrics that a run logs. One batch of the unchanged configuration shows them."""
    silent = {"enable_progress_bar": False, "logger": False, "observe": False}
    with quiet():
        cli = build({**plan.base, "trainer": {**plan.base["trainer"], **silent, "fast_dev_run": True}})
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return list(cli.trainer.callback_metrics)


def _one_device(base: dict[str, Any]) -> dict[str, Any]:
    """The configuration with one device; an error if it asks for several."""
    trainer = base["trainer"]
    if trainer["devices"] not in ("auto", 1, "1") or trainer["num_nodes"] != 1:
        raise ValueError(
            f"trainer.devices is {trainer['devices']}, but a trial runs in one process on one device: set it to 1, and "
            "--workers to the number of devices."
        )
    return {**base, "trainer": {**trainer, "devices": 1}}


def _is_unfinished(study: optuna.Study, plan: Plan) -> bool:
    return sum(trial.state in FINISHED for trial in study.get_trials(deepcopy=False)) < len(plan.points)


def _difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first dotted key in which two definitions differ. Keys of the machine, such as its folders, do not count."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            if name in _OF_THE_MACHINE:
                continue
            found = _difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if old == new else key


def _running(count: int) -> str:
    return f", {count} running" if count else ""


def _say_end(study: optuna.Study, plan: Plan, folder: Path) -> None:
    trials = study.get_trials(deepcopy=False)
    num_done = sum(trial.state in FINISHED for trial in trials)
    errors = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
    if not best_trials(study):
        if num_done < len(plan.points):
            return
        reason = f" The first error was: {errors[0]}" if errors else ""
        raise ValueError(
            f"study is {plan.study!r}, but none of its trials was trained to its end: change the space.{reason}"
        )
    spent = sum((trial.duration.total_seconds() for trial in trials if trial.duration), 0.0)
    log.info("")
    log.info("%d of %d trials done, %s of training", num_done, len(plan.points), duration(spent))
    if errors:
        log.info("%d trials could not be trained; the first error was: %s", len(errors), errors[0])
    log.info("study          %s  (trials.csv, pictures)", folder)
    log.info("look           tensorboard --logdir %s", as_argument(folder))
    log.info("best           project fit --config %s", as_argument(folder / "best.yaml"))
    if num_done < len(plan.points):
        log.info("continue       with the same command")
