"""What a study is: the base configuration, the space, the objectives, sampler, pruner, how many trials and seeds.

Samplers and pruners are Optuna's: random (Bergstra & Bengio 2012), TPE (Bergstra et al. 2011), CMA-ES (Hansen &
Ostermeier 2001), the median rule (Golovin et al. 2017, sec. 3.2), Hyperband (Li et al. 2018, arXiv:1603.06560) with
asynchronous halving (ASHA, Li et al. 2020, arXiv:1810.05934).
"""

import difflib
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
"""Objectives that are no logged metric."""
DEFAULT_TRIALS = 30


@dataclass(frozen=True)
class Plan:
    """A study, as plain values: worker processes get it as it is.

    Args:
        base: resolved configuration of a run.
        spec: the search space, as in YAML.
        objectives: logged metrics or :data:`COSTS`.
        sampler: grid, random, tpe or cma-es.
        pruner: none, median or hyperband.
        trials: how many; ``None`` is every point of a grid, else 30.
        baseline: whether the first trial is the base configuration as it is.
        seeds: runs of a trial, with seeds that follow each other; the objective is their mean.
        study: name.
        storage: URL or path.
        search_seed: of the sampler.
        heartbeat_s: seconds between two signs of life of a running trial.
        deadline: of ``time.time()``, after which no trial begins.
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
            raise ValueError(f"objective is {list(self.objectives)}: name one or more, each once.")
        if any(name.startswith("test/") for name in self.objectives):
            raise ValueError("objective is of the test images: choose by val/…, and look at the test once at the end.")
        if len(self.objectives) > 1 and (self.pruner != "none" or self.sampler == "cma-es"):
            raise ValueError(
                f"{len(self.objectives)} objectives go with pruner none and sampler grid, random or tpe, not with "
                f"pruner {self.pruner} and sampler {self.sampler}: name one objective or choose those."
            )
        if self.baseline and self.sampler == "grid":
            raise ValueError("baseline is true, but a grid has its own points: put the configuration's values into it.")
        if self.pruner != "none" and not self.objectives[0].startswith("val/"):
            raise ValueError(f"pruner {self.pruner} needs an objective of each epoch, val/…, not {self.objectives[0]}.")

    @cached_property
    def space(self) -> Space:
        return Space(self.spec)

    @cached_property
    def points(self) -> list[Params]:
        """What each trial is told in advance: a grid's point, or nothing."""
        if self.sampler == "grid":
            return self.space.grid()[: self.trials]
        told = [self.space.point_of(self.base)] if self.baseline else []
        return told + [{}] * ((self.trials or DEFAULT_TRIALS) - len(told))

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        return ["minimize" if falls(name) else "maximize" for name in self.objectives]

    def make_sampler(self) -> BaseSampler:
        """Each trial has a seed of its own: neither a restart nor the number of workers repeats a random point."""
        kinds: dict[str, Callable[[int], BaseSampler]] = {
            "grid": lambda seed: RandomSampler(seed=seed),  # its points are told in advance
            "random": lambda seed: RandomSampler(seed=seed),
            "tpe": lambda seed: TPESampler(seed=seed),
            "cma-es": lambda seed: CmaEsSampler(seed=seed, warn_independent_sampling=False),
        }
        return SeededByTrial(kinds[self.sampler], self.search_seed)

    def make_pruner(self) -> BasePruner:
        if self.pruner == "median":  # in its first third a run says little of how it ends
            return MedianPruner(n_warmup_steps=max(1, self._longest() // 3))
        if self.pruner == "hyperband":
            return HyperbandPruner(min_resource=1, max_resource=self._longest(), reduction_factor=3)
        return NopPruner()

    def _longest(self) -> int:
        """Epochs of the longest trial."""
        key = "trainer.max_epochs"
        searched = next((dim.ends() for dim in self.space.dimensions if dim.key == key), [])
        lengths = searched or [self.base["trainer"]["max_epochs"]]
        if not all(isinstance(length, int) and length > 0 for length in lengths):
            raise ValueError(
                f"pruner {self.pruner} needs {key} in the configuration: it compares trials by their epochs."
            )
        return max(lengths)


class SeededByTrial(BaseSampler):
    """A sampler that is made anew for each trial, with a seed of its number; all else it knows is in the study.

    Args:
        make: seed -> sampler.
        seed: added to each trial's number.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(seed)

    def before_trial(self, study: "Study", trial: "FrozenTrial") -> None:
        self._sampler = self._make(self._seed + trial.user_attrs.get("ticket", trial.number))
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


def falls(objective: str) -> bool:
    """Whether less is better: costs, losses and errors."""
    return objective in COSTS or objective.endswith(("loss", "error"))


def check_objectives(objectives: Sequence[str], logged: Sequence[str]) -> None:
    """Refuse an objective that no run logs.

    Raises:
        ValueError: that names the nearest.
    """
    known = [*sorted(name for name in logged if not name.startswith("test/")), *COSTS]
    for name in objectives:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"objective is {name!r}, but a run logs only {', '.join(known)}.{hint}")
