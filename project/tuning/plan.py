"""The definition of a study: base configuration, space, objectives, sampler, pruner, numbers of trials and seeds.

Samplers and pruners come from Optuna: random (Bergstra & Bengio 2012), TPE (Bergstra et al. 2011), CMA-ES (Hansen &
Ostermeier 2001), the median rule (Golovin et al. 2017, sec. 3.2), Hyperband (Li et al. 2018, arXiv:1603.06560) with
asynchronous halving (ASHA, Li et al. 2020, arXiv:1810.05934).
"""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler

from project.tuning.dimension import Params
from project.tuning.space import Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

COSTS = ("macs", "num_parameters", "bytes", "train_seconds", "fit_seconds")
"""Objectives that are measured apart from the logged metrics."""
DEFAULT_TRIALS = 30
"""Number of trials if none is given and the sampler is no grid."""


@dataclass(frozen=True)
class Plan:
    """A study as plain values, so that it can be sent to worker processes.

    Example::

        >>> from project.tuning import Plan
        >>> plan = Plan(base={}, spec={"model.net.width": [0.5, 1.0]}, objectives=("val/accuracy",), sampler="grid",
        ...             pruner="none", trials=None, baseline=False, seeds=3, study="width", storage="study.journal",
        ...             search_seed=0, heartbeat_s=15, deadline=None)
        >>> plan.points, plan.directions
        ([{'model.net.width': 0.5}, {'model.net.width': 1.0}], ['maximize'])

    Args:
        base: resolved configuration of a run, whose values the trials change.
        spec: search space, as in YAML (:mod:`project.tuning.space`).
        objectives: logged validation metrics or :data:`COSTS`; one or more, each once.
        sampler: name of the sampler: grid, random, tpe or cma-es.
        pruner: name of the pruner: none, median or hyperband.
        trials: number of trials of the whole study; 1 or more. ``None`` takes every point of a grid, or 30 for another
            sampler.
        baseline: whether the first trial is the base configuration without changes.
        seeds: number of runs of each trial; 1 or more. The objective is their mean. The first run has the seed of the
            configuration, the others have seeds derived from it (:func:`run_seed`).
        study: name of the study.
        storage: URL of a database, or path of a file (:func:`project.tuning.open_storage`).
        search_seed: seed of the sampler; any int.
        heartbeat_s: number of seconds between two signs of life of a running trial; 1 or more.
        deadline: time (as of ``time.time()``) after which no trial begins; ``None`` for no limit.

    Raises:
        ValueError: if a number is below 1, or objectives, sampler, pruner and baseline do not go together.
    """

    base: dict[str, Any]
    spec: dict[str, Any]
    objectives: tuple[str, ...]
    sampler: str
    pruner: str
    trials: int | None
    baseline: bool
    seeds: int
    study: str
    storage: str
    search_seed: int
    heartbeat_s: int
    deadline: float | None

    def __post_init__(self) -> None:
        limits = {"trials": self.trials, "seeds": self.seeds, "heartbeat_s": self.heartbeat_s}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: choose 1 or more.")
        if len(set(self.objectives)) < max(len(self.objectives), 1):
            raise ValueError(f"objective is {list(self.objectives)}: give one or more names, each once.")
        if any(name.startswith("test/") for name in self.objectives):
            raise ValueError(
                f"objective is {list(self.objectives)}, measured on the test images: choose by val/…, and use the test "
                "images once, at the end."
            )
        if len(self.objectives) > 1 and (self.pruner != "none" or self.sampler == "cma-es"):
            raise ValueError(
                f"objective has {len(self.objectives)} names, with pruner {self.pruner} and sampler {self.sampler}: "
                "name one objective, or choose pruner none and sampler grid, random or tpe."
            )
        if self.baseline and self.sampler == "grid":
            raise ValueError("baseline is true, but a grid has its own points: add the configuration's values to them.")
        if self.pruner != "none" and not self.objectives[0].startswith("val/"):
            raise ValueError(
                f"pruner is {self.pruner}, which needs an objective of each epoch, but objective is "
                f"{self.objectives[0]}: choose pruner none, or a metric val/…."
            )

    @cached_property
    def space(self) -> Space:
        """The search space."""
        return Space(self.spec)

    @cached_property
    def points(self) -> list[Params]:
        """What is decided about each trial in advance: a grid's point, the baseline's point, or nothing."""
        if self.sampler == "grid":
            return self.space.grid()[: self.trials]
        told = [self.space.point_of(self.base)] if self.baseline else []
        return told + [{}] * ((self.trials or DEFAULT_TRIALS) - len(told))

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Whether each objective is minimized or maximized."""
        return ["minimize" if falls(name) else "maximize" for name in self.objectives]

    def make_sampler(self) -> BaseSampler:
        """The sampler. Each trial has its own seed, so neither a restart nor several workers repeat a random point."""
        kinds: dict[str, Callable[[int], BaseSampler]] = {
            "grid": lambda seed: RandomSampler(seed=seed),  # unused: the points are given in advance
            "random": lambda seed: RandomSampler(seed=seed),
            "tpe": lambda seed: TPESampler(seed=seed),
            "cma-es": lambda seed: CmaEsSampler(seed=seed, warn_independent_sampling=False),
        }
        return SeededByTrial(kinds[self.sampler], self.search_seed)

    def make_pruner(self) -> BasePruner:
        """The pruner, set up for the longest trial."""
        if self.pruner == "median":  # the first third of a run says little about its end
            return MedianPruner(n_warmup_steps=max(1, self._longest() // 3))
        if self.pruner == "hyperband":
            return HyperbandPruner(min_resource=1, max_resource=self._longest(), reduction_factor=3)
        return NopPruner()

    def _longest(self) -> int:
        """The number of epochs of the longest trial."""
        key = "trainer.max_epochs"
        searched = next((dim.ends() for dim in self.space.dimensions if dim.key == key), [])
        lengths = searched or [self.base["trainer"]["max_epochs"]]
        if not all(isinstance(length, int) and length > 0 for length in lengths):
            raise ValueError(
                f"pruner is {self.pruner}, which compares trials by their epochs, but {key} is {lengths}: set it to 1 "
                "or more."
            )
        return max(lengths)


class SeededByTrial(BaseSampler):
    """A sampler that is made anew for each trial, with a seed that depends on the trial's number.

    The sampler keeps nothing else between trials: everything it needs is in the study.

    Args:
        make: function that makes a sampler from a seed.
        seed: seed of the study, from which the seed of each trial is derived; any int.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(derived_seed("study", seed, 0))

    def before_trial(self, study: "Study", trial: "FrozenTrial") -> None:
        self._sampler = self._make(derived_seed("trial", self._seed, trial.user_attrs.get("ticket", trial.number)))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: "Study", trial: "FrozenTrial") -> "dict[str, BaseDistribution]":
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: "Study", trial: "FrozenTrial", search_space: "dict[str, BaseDistribution]"
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: "Study", trial: "FrozenTrial", param_name: str, param_distribution: "BaseDistribution"
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: "Study", trial: "FrozenTrial", state: "TrialState", values: Sequence[float] | None
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)


def derived_seed(purpose: str, seed: int, number: int) -> int:
    """A seed of 32 bits that depends on all three arguments. A sum of seed and number would repeat for other seeds.

    Args:
        purpose: use of the seed, such as ``"trial"``; the seeds of two uses are independent.
        seed: seed that the new one is derived from; any int.
        number: number of the new seed; any int.
    """
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} {number}".encode()).digest()[:4], "little")


def run_seed(seed: int, number: int) -> int:
    """The seed of one of a trial's runs: the configuration's own for the first, and a derived one for each other.

    Args:
        seed: seed of the configuration; any int.
        number: number of the run; 0 or more.
    """
    return seed if number == 0 else derived_seed("run", seed, number)


def falls(objective: str) -> bool:
    """Whether smaller values of the objective are better. That is so for costs, losses and errors."""
    return objective in COSTS or objective.endswith(("loss", "error"))


def check_objectives(objectives: Sequence[str], logged: Sequence[str]) -> None:
    """Refuse an objective that no run logs.

    Raises:
        ValueError: if there is one; it names the nearest metric.
    """
    known = [*sorted(name for name in logged if not name.startswith("test/")), *COSTS]
    for name in objectives:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"objective is {name!r}, which no run logs: choose one of {', '.join(known)}.{hint}")
