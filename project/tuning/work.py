"""The work on a study: each trial is trained exactly once, with any number of processes and machines, even if some die.

A study is a queue of tickets, one for each trial. A process that opens the study adds the tickets that are missing. A
worker takes a ticket, which the storage gives to one process only, and trains it. If a process dies, its heartbeat
stops, and its ticket goes back to the queue with the same values. For a grid, a ticket holds a point; for the other
samplers it is empty.

Optuna's own loop (``Study.optimize``) counts trials in each process separately. With several workers it runs too many
trials and repeats points of a grid. It retries the trial of a killed process only in databases.
"""

import logging
import multiprocessing
import time
import warnings
from collections import defaultdict

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import fail_stale_trials
from optuna.storages._heartbeat import BaseHeartbeat, get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState

from project.tuning.plan import Plan
from project.tuning.progress import FINISHED, say_trial
from project.tuning.storage import open_storage
from project.tuning.trial import run_trial, sentence

log = logging.getLogger(__name__)

MAX_LOSSES = 4
"""Number of times that the process of a ticket may die before the ticket is given up."""


def open_study(plan: Plan) -> optuna.Study:
    """Open the study, or make it if it does not exist."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=open_storage(plan.storage, plan.heartbeat_s),
        study_name=plan.study,
        directions=plan.directions,
        sampler=plan.make_sampler(),
        pruner=plan.make_pruner(),
        load_if_exists=True,
    )


def fill(study: optuna.Study, plan: Plan) -> int:
    """Add each ticket that has no trial yet, or only trials whose process died.

    Two processes that do this at the same moment make doubles. :func:`take` drops them.

    Returns:
        The number of tickets that were added.
    """
    tries: dict[int, list[FrozenTrial]] = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        tries[trial.user_attrs.get("ticket", -1)].append(trial)
    num_filled = 0
    for ticket, params in enumerate(plan.points):
        lost = [trial for trial in tries[ticket] if "double" not in trial.user_attrs]
        if any(trial.state != TrialState.FAIL for trial in lost) or len(lost) >= MAX_LOSSES:
            continue
        study.enqueue_trial({**params, **(lost[-1].params if lost else {})}, user_attrs={"ticket": ticket})
        num_filled += 1
    return num_filled


def take(study: optuna.Study) -> optuna.Trial | None:
    """Take a waiting trial for this process and send its first heartbeat; ``None`` if no trial waits."""
    storage = study._storage
    assert isinstance(storage, BaseHeartbeat)
    for waiting in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        storage.record_heartbeat(waiting._trial_id)  # before it runs: a trial without heartbeat never counts as dead
        try:
            if not storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                continue
        except UpdateFinishedTrialError:
            continue
        if not _is_double(study, waiting):
            return optuna.Trial(study, waiting._trial_id)
        storage.set_trial_user_attr(waiting._trial_id, "double", True)
        storage.set_trial_state_values(waiting._trial_id, state=TrialState.FAIL)
    return None


def work(plan: Plan) -> None:
    """Train trials until none is left on any machine, or the time is up.

    An interrupted trial goes back to the queue.
    """
    warnings.simplefilter("ignore", ExperimentalWarning)
    study = open_study(plan)
    parent = multiprocessing.parent_process()
    while (plan.deadline is None or time.time() < plan.deadline) and (parent is None or parent.is_alive()):
        fail_stale_trials(study)
        trial = take(study)
        if trial is not None:
            attempt(study, trial, plan)
        elif not fill(study, plan):
            if not study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                return
            time.sleep(1)  # another process may still die, and its trial would then be free


def attempt(study: optuna.Study, trial: optuna.Trial, plan: Plan) -> None:
    """Train one trial and report its result to the study.

    A point that cannot be trained (the loss is NaN, the batch is larger than the data, memory is short) counts as
    pruned, so that samplers learn to avoid it.
    """
    values, state = None, TrialState.FAIL
    try:
        with get_heartbeat_thread(trial._trial_id, study._storage):
            values, state = run_trial(trial, plan), TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except UpdateFinishedTrialError:
        log.warning("trial %d is dropped: this process was silent for too long, and another took it over", trial.number)
    except (ValueError, RuntimeError) as error:
        trial.set_user_attr("error", sentence(error))
        state = TrialState.PRUNED
    finally:
        told = study.tell(trial, values, state, skip_if_finished=True)
    if state in FINISHED and told.state == state:
        say_trial(study, told, plan)


def _is_double(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether an earlier trial already has the same ticket."""
    ticket = trial.user_attrs.get("ticket")
    return any(
        other.number < trial.number and other.user_attrs.get("ticket") == ticket and other.state != TrialState.FAIL
        for other in study.get_trials(deepcopy=False)
    )
