"""``project tune``: check what is wanted, join the study, let workers train, and report.

Hyperparameter search with Optuna (Akiba et al. 2019, arXiv:1907.10902). The same command begins a study, goes on with
it and, with a storage that others see, joins it from another machine.
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
from project.frame.paths import Paths
from project.tuning.plan import Plan, check_objectives
from project.tuning.progress import FINISHED, best_trials, duration
from project.tuning.report import publish
from project.tuning.trial import build, quiet
from project.tuning.work import fill, open_study, work
from project.tuning.workers import GONE, work_in_processes

log = logging.getLogger(__name__)

_OF_THE_MACHINE = ("logs_dir", "data_dir", "root", "num_workers", "accelerator", "devices", "default_root_dir")
"""Keys that may differ between machines that work on one study."""


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
    """Search, and leave table, best configuration and pictures in ``<logs>/<study>``; see
    :meth:`project.frame.verbs.Trainer.tune`.

    Raises:
        ValueError: for what cannot be searched, before the first trial.
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
    try:
        if _is_unfinished(joined, plan):
            if workers == 1:
                work(plan)
            else:
                work_in_processes(plan, workers)
    except (KeyboardInterrupt, SystemExit):  # the latter is what Lightning makes of it
        log.info("stopped: the same command goes on with study %s", study)
    except StorageInternalError:
        raise ValueError(GONE) from None
    publish(joined, plan, folder)
    _say_end(joined, plan, folder)
    return joined


def check_space(plan: Plan) -> None:
    """Parse a configuration for every choice and both ends of every range.

    Raises:
        ValueError: for keys and values that the configuration does not take.
    """
    plan.space.check_keys(plan.base)
    plan.make_pruner()
    plan.points  # noqa: B018  (a grid of too many points, or of none)
    with quiet():
        parser = build(plan.base).parser
    parser.exit_on_error = False
    before: dict[str, Any] = {}
    for params in plan.space.probes():
        try:
            parser.parse_object(deepcopy(plan.space.apply(plan.base, params)))
        except Exception as error:  # jsonargparse has several kinds
            changed = [key for key in params if key not in before or before[key] != params[key]]
            where = f"{changed[0]} is {params[changed[0]]!r}" if before and changed else "its first point is refused"
            near = parser._nearest(str(error)) if isinstance(parser, Parser) else None
            hint = f" Did you mean {near!r}?" if near else ""
            raise ValueError(f"space: {where}: {one_sentence(str(error)).rstrip('.')}.{hint}") from None
        before = before or params


def begin(study: optuna.Study, plan: Plan) -> None:
    """Compare with what the study was begun with, or note it; queue what is not there; say what is done.

    Raises:
        ValueError: when the study searches something else, or an objective is logged by no run.
    """
    wanted = {"base": plan.base, "space": plan.spec, "objective": list(plan.objectives), "seeds": plan.seeds}
    noted = study.user_attrs.get("definition")
    if noted is None:
        check_objectives(plan.objectives, logged_metrics(plan))
        study.set_user_attr("definition", json.dumps(wanted))
    elif (key := _difference(json.loads(noted), json.loads(json.dumps(wanted)))) is not None:
        raise ValueError(
            f"study {plan.study!r} was begun with another {key}: give the command that it was begun with, or name "
            "another study (--study NAME)."
        )
    fill(study, plan)
    trials = study.get_trials(deepcopy=False)
    num_done = sum(trial.state in FINISHED for trial in trials)
    num_running = sum(trial.state == TrialState.RUNNING for trial in trials)
    log.info("study %s: %d of %d trials done%s", plan.study, num_done, len(plan.points), _running(num_running))


def logged_metrics(plan: Plan) -> list[str]:
    """What a run logs, found out by one batch of the configuration as it is."""
    silent = {"enable_progress_bar": False, "logger": False, "observe": False}
    with quiet():
        cli = build({**plan.base, "trainer": {**plan.base["trainer"], **silent, "fast_dev_run": True}})
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return list(cli.trainer.callback_metrics)


def _one_device(base: dict[str, Any]) -> dict[str, Any]:
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
    """The first dotted key in which two definitions differ, leaving out those of the machine."""
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
        reason = f" The first said: {errors[0]}" if errors else ""
        raise ValueError(f"study {plan.study!r} has no trial that was trained to its end.{reason}")
    spent = sum((trial.duration.total_seconds() for trial in trials if trial.duration), 0.0)
    log.info("")
    log.info("%d of %d trials done, %s of training", num_done, len(plan.points), duration(spent))
    if errors:
        log.info("%d could not be trained; the first said: %s", len(errors), errors[0])
    log.info("study          %s  (trials.csv, pictures)", folder)
    log.info("look           tensorboard --logdir %s", folder)
    log.info("best           project fit --config %s", folder / "best.yaml")
    if num_done < len(plan.points):
        log.info("go on          with the same command")
