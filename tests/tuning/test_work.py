"""The queue of a study: a ticket goes to one worker, doubles are dropped, lost ones come back a few times."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState

from project.tuning.plan import Plan, derived_seed, run_seed
from project.tuning.report import for_pictures
from project.tuning.work import MAX_LOSSES, fill, open_study, take


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(
        base={},
        spec={"a": [1, 2, 3]},
        objectives=("val/accuracy",),
        sampler="grid",
        pruner="none",
        trials=None,
        baseline=False,
        seeds=1,
        study="s",
        storage=str(tmp_path / "study.journal"),
        search_seed=0,
        heartbeat_s=1,
        deadline=None,
    )


def test_two_workers_share_the_tickets(plan):
    one, other = open_study(plan), open_study(plan)
    assert fill(one, plan) == 3 and fill(other, plan) == 0
    taken = [take(study) for study in (one, other, one, other)]
    points = [plan.space.suggest(trial)["a"] for trial in taken if trial is not None]
    assert sorted(points) == [1, 2, 3] and taken[3] is None


def test_a_ticket_that_two_commands_put_in_at_once_is_run_once(plan):
    study = open_study(plan)
    for ticket in (0, 0, 1):
        study.enqueue_trial({"a": ticket + 1}, user_attrs={"ticket": ticket})
    taken = [take(study), take(study), take(study)]
    assert [trial.number for trial in taken if trial is not None] == [0, 2]
    assert [trial.user_attrs.get("double") for trial in study.trials] == [None, True, None]
    assert fill(study, plan) == 1, "a double is no loss, and the third ticket was not there"


def test_a_silent_trial_is_lost_and_comes_back_until_it_has_killed_too_often(plan):
    study = open_study(plan)
    alive = Path(f"{plan.storage}.alive")
    fill(study, plan)
    for attempt in range(1, MAX_LOSSES + 1):
        trial = next(one for one in iter(lambda: take(study), None) if one.user_attrs["ticket"] == 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
            assert study.trials[trial.number].state == TrialState.RUNNING, "it has just been heard of"
            beat = (alive / str(trial._trial_id)).stat().st_mtime
            os.utime(alive / str(trial._trial_id), (beat - 5, beat - 5))
            fail_stale_trials(study)
        assert study.trials[trial.number].state == TrialState.FAIL
        study.tell(trial, 0.5, state=TrialState.COMPLETE, skip_if_finished=True)  # it was alive after all
        assert study.trials[trial.number].state == TrialState.FAIL, "its result is dropped"
        assert fill(study, plan) == (attempt < MAX_LOSSES)


def test_a_ticket_lost_before_its_values_were_drawn_comes_back_with_its_point(plan):
    study = open_study(plan)
    fill(study, plan)
    study.tell(take(study), state=TrialState.FAIL)
    assert fill(study, plan) == 1
    points = [plan.space.suggest(trial)["a"] for trial in iter(lambda: take(study), None)]
    assert sorted(points) == [1, 2, 3]


def test_pictures_number_trials_as_the_table_does_when_one_was_lost(plan):
    study = open_study(plan)
    fill(study, plan)
    for state in (TrialState.FAIL, TrialState.COMPLETE):
        trial = take(study)
        plan.space.suggest(trial)
        study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)
    drawn = for_pictures(study, plan, [0]).get_trials(states=[TrialState.COMPLETE])
    assert [(trial.number, trial.value) for trial in drawn] == [(1, 0.5)]


@pytest.mark.parametrize("sampler", ["random", "tpe", "cma-es"])
def test_studies_of_neighbouring_seeds_have_no_point_in_common(plan, sampler):
    found = []
    for seed in (-1, 0, 1, 2):
        fresh = replace(plan, sampler=sampler, spec={"a": {"float": [0.0, 1.0]}}, search_seed=seed, trials=8)
        study = optuna.create_study(sampler=fresh.make_sampler())
        study.optimize(lambda trial: trial.suggest_float("a", 0, 1), n_trials=8)
        found += [trial.params["a"] for trial in study.trials]
    assert len(set(found)) == len(found) == 32


def test_seeds_of_neighbouring_configurations_do_not_meet():
    seeds = [run_seed(seed, number) for seed in range(20) for number in range(20)]
    assert len(set(seeds)) == 400 and max(seeds) < 2**32 and min(seeds) == 0
    assert [run_seed(7, number) for number in (0, 1)] == [7, derived_seed("run", 7, 1)]
    assert derived_seed("run", 7, 1) != derived_seed("trial", 7, 1)
