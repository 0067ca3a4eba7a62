"""Schedules: how much is pruned, and when. In one round, in equal rounds, by a list, or gradually during the training.

Rounds: Han et al. 2015 (arXiv:1506.02626, sec. 3.4), Frankle & Carbin 2019 (arXiv:1803.03635, sec. 1). Gradual: Zhu &
Gupta 2017 (arXiv:1710.01878, eq. 1).
"""

import math
from abc import ABC, abstractmethod
from itertools import pairwise


class Rounds(ABC):
    """Base class of schedules with rounds, which begin after the training of the dense net.

    Each round prunes the net and trains it again. A subclass returns the amounts of its rounds.

    Example::

        >>> from project.compression import Rounds
        >>> class Halving(Rounds):
        ...     def amounts(self) -> list[float]:
        ...         return [0.5, 0.5, 0.5]
        >>> [Halving().level(number) for number in range(3)]
        [0.5, 0.75, 0.875]
    """

    @abstractmethod
    def amounts(self) -> list[float]:
        """For each round, the share of what is left that is pruned; for :class:`QualityFactors`, the factor."""

    def amount(self, number: int, gone: float) -> float:
        """The share of what is left that a round must prune to reach its level.

        A round can prune more than its amount, if widths are multiples of ``round_to`` or if dead ends are pruned too.
        The next round then prunes less.

        Args:
            number: number of the round, counted from 0.
            gone: share of the dense net that is pruned before this round, in [0, 1).
        """
        return share_to_take(gone, self.level(number))

    def level(self, number: int) -> float:
        """The share of the dense net that is pruned after a round.

        Args:
            number: number of the round, counted from 0; -1 is the last round.
        """
        amounts = self.amounts()
        return 1 - math.prod(1 - amount for amount in amounts[: number % len(amounts) + 1])


class OneShot(Rounds):
    """Prunes in one round.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.IterativeMagnitudePruning
              init_args:
                schedule:
                  class_path: project.compression.OneShot
                  init_args: {sparsity: 0.8}

    Args:
        sparsity: share of the dense net that is pruned, in (0, 1).
    """

    def __init__(self, sparsity: float = 0.9) -> None:
        _check_share("sparsity", sparsity)
        self.sparsity = sparsity

    def amounts(self) -> list[float]:
        return [self.sparsity]


class Iterative(Rounds):
    """Prunes the same share of what is left in each round: after r rounds the share ``(1 - fraction)^r`` is left.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.IterativeMagnitudePruning
              init_args:
                schedule:
                  class_path: project.compression.Iterative
                  init_args: {fraction: 0.2, rounds: 10}

    Args:
        fraction: share of what is left that each round prunes, in (0, 1).
        rounds: number of rounds, 1 or more.
    """

    def __init__(self, fraction: float = 0.2, rounds: int = 10) -> None:
        _check_share("fraction", fraction)
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}, but it is a number of rounds: choose 1 or more.")
        self.fraction, self.rounds = fraction, rounds

    def amounts(self) -> list[float]:
        return [self.fraction] * self.rounds


class Sparsities(Rounds):
    """Prunes to a given sparsity in each round.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.IterativeMagnitudePruning
              init_args:
                schedule:
                  class_path: project.compression.Sparsities
                  init_args: {levels: [0.5, 0.8, 0.9]}

    Args:
        levels: shares of the dense net that are pruned after each round, in (0, 1), rising.
    """

    def __init__(self, levels: list[float]) -> None:
        if not levels:
            raise ValueError("levels is empty: give the sparsity after each round, such as [0.5, 0.8, 0.9].")
        for level in levels:
            _check_share("levels", level)
        if any(before >= after for before, after in pairwise(levels)):
            raise ValueError(f"levels is {levels}, but pruned weights stay pruned: give rising sparsities.")
        self.levels = list(levels)

    def amounts(self) -> list[float]:
        return [share_to_take(before, after) for before, after in pairwise([0.0, *self.levels])]


class QualityFactors(Rounds):
    """Prunes by Han's thresholds, together with ``scope: deviation``.

    In each round, a layer's threshold is the round's factor times the standard deviation of its remaining weights.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.IterativeMagnitudePruning
              init_args:
                schedule:
                  class_path: project.compression.QualityFactors
                  init_args: {factors: [0.8, 1.0]}
                pruner:
                  class_path: project.compression.Pruner
                  init_args: {scope: deviation}

    Args:
        factors: a factor on the standard deviations for each round, above 0.
    """

    def __init__(self, factors: list[float]) -> None:
        if not factors or min(factors) <= 0:
            raise ValueError(
                f"factors is {factors}, but each round needs a factor above 0: give a list such as [0.8, 1.0]."
            )
        self.factors = list(factors)

    def amounts(self) -> list[float]:
        return self.factors


class Gradual:
    """Prunes step by step during the dense training, without rounds.

    Between ``begin_epoch`` and ``end_epoch`` the sparsity is ``final + (initial - final) * (1 - progress)^3``, where
    ``progress`` rises from 0 to 1.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.IterativeMagnitudePruning
              init_args:
                schedule:
                  class_path: project.compression.Gradual
                  init_args: {final: 0.9, begin_epoch: 3, end_epoch: 20, every_n_steps: 50}

    Args:
        final: sparsity from ``end_epoch`` on, in (0, 1).
        begin_epoch: epoch of the first pruning, 0 or more; it may be a fraction, such as 1.5.
        end_epoch: epoch of the last pruning, above ``begin_epoch`` and before the last epoch that is saved, so that the
            pruned net is trained for some epochs; it may be a fraction, such as 10.5.
        every_n_steps: number of optimizer steps from one pruning to the next, 1 or more.
        initial: sparsity at ``begin_epoch``, in [0, ``final``).
    """

    def __init__(
        self, final: float, begin_epoch: float, end_epoch: float, every_n_steps: int = 100, initial: float = 0.0
    ) -> None:
        _check_share("final", final)
        if not 0 <= begin_epoch < end_epoch:
            raise ValueError(
                f"begin_epoch is {begin_epoch} and end_epoch is {end_epoch}: choose a begin_epoch of 0 or more, and a "
                "larger end_epoch."
            )
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, but it is a number of steps: choose 1 or more.")
        if not 0 <= initial < final:
            raise ValueError(f"initial is {initial}, but final is {final}: choose 0 or more, below final.")
        self.final, self.initial = final, initial
        self.begin_epoch, self.end_epoch, self.every_n_steps = begin_epoch, end_epoch, every_n_steps

    def sparsity_at(self, step: int, steps_per_epoch: float) -> float | None:
        """The sparsity to prune to before an optimizer step; ``None`` if this step prunes nothing.

        Args:
            step: number of the optimizer step, counted from 0.
            steps_per_epoch: number of optimizer steps in an epoch, above 0.
        """
        # Rounded down, so that a moment before the end of the training is a step of it. 1e-6 is for 28.999999999999996.
        begin, end = (math.floor(epoch * steps_per_epoch + 1e-6) for epoch in (self.begin_epoch, self.end_epoch))
        if not begin <= step <= end or ((step - begin) % self.every_n_steps and step != end):
            return None
        progress = (step - begin) / (end - begin) if begin < end else 1.0
        return self.final + (self.initial - self.final) * (1 - progress) ** 3  # Zhu & Gupta, eq. 1


def share_to_take(before: float, after: float) -> float:
    """The share of what is left at sparsity ``before`` that must be pruned to reach sparsity ``after``; 0 or more."""
    return max(0.0, 1 - (1 - after) / (1 - before))


def _check_share(name: str, share: float) -> None:
    """Check that an argument lies between 0 and 1, both excluded.

    Raises:
        ValueError: if it does not.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"{name} has {share}, but it is the share that is pruned: choose a number between 0 and 1, such as 0.8."
        )
