"""How much goes when: one shot, iterative, an explicit list, or gradually while the net trains.

Iterative: Han et al. 2015 (arXiv:1506.02626, sec. 3.4), Frankle & Carbin 2019 (arXiv:1803.03635, sec. 1). Gradual: Zhu
& Gupta 2017 (arXiv:1710.01878, eq. 1).
"""

import math
from abc import ABC, abstractmethod
from itertools import pairwise


class Rounds(ABC):
    """Prune, train on, and again: rounds that follow the training of the dense net."""

    @abstractmethod
    def amounts(self) -> list[float]:
        """Share of what is left that goes, round by round (of :class:`QualityFactors`, the factors)."""

    def amount(self, number: int, gone: float) -> float:
        """That of round ``number``, counted from 0, when the share ``gone`` is gone before it.

        Where widths are round numbers, or dead ends go as well, a round takes more than was asked for; the next one
        then takes less.
        """
        return share_to_take(gone, self.level(number))

    def level(self, number: int) -> float:
        """The share that is gone after round ``number``; -1 is the last."""
        amounts = self.amounts()
        return 1 - math.prod(1 - amount for amount in amounts[: number % len(amounts) + 1])


class OneShot(Rounds):
    """One round.

    Args:
        sparsity: share that goes, in (0, 1).
    """

    def __init__(self, sparsity: float = 0.9) -> None:
        _check_share("sparsity", sparsity)
        self.sparsity = sparsity

    def amounts(self) -> list[float]:
        return [self.sparsity]


class Iterative(Rounds):
    """The same share of what is left in each round: after r rounds ``(1 - fraction)^r`` are left.

    Args:
        fraction: in (0, 1).
        rounds: how many.
    """

    def __init__(self, fraction: float = 0.2, rounds: int = 10) -> None:
        _check_share("fraction", fraction)
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}: choose 1 or more.")
        self.fraction, self.rounds = fraction, rounds

    def amounts(self) -> list[float]:
        return [self.fraction] * self.rounds


class Sparsities(Rounds):
    """One round for each sparsity.

    Args:
        levels: shares that are gone after each round, in (0, 1), rising.
    """

    def __init__(self, levels: list[float]) -> None:
        if not levels:
            raise ValueError("levels is empty: give the sparsity after each round, such as [0.5, 0.8, 0.9].")
        for level in levels:
            _check_share("levels", level)
        if any(before >= after for before, after in pairwise(levels)):
            raise ValueError(f"levels is {levels}, but what is pruned stays pruned: give rising sparsities.")
        self.levels = list(levels)

    def amounts(self) -> list[float]:
        return [share_to_take(before, after) for before, after in pairwise([0.0, *self.levels])]


class QualityFactors(Rounds):
    """Han's thresholds, for ``scope: deviation``: one factor on the standard deviations in each round.

    Args:
        factors: above 0.
    """

    def __init__(self, factors: list[float]) -> None:
        if not factors or min(factors) <= 0:
            raise ValueError(f"factors is {factors}: give one number above 0 for each round, such as [0.8, 1.0].")
        self.factors = list(factors)

    def amounts(self) -> list[float]:
        return self.factors


class Gradual:
    """While the dense net trains, ``final + (initial - final) * (1 - progress)^3`` between two epochs; no rounds.

    Args:
        final: sparsity from ``end_epoch`` on, in (0, 1).
        begin_epoch: first pruning; the epochs may be fractions.
        end_epoch: last pruning; the epochs after it heal the net.
        every_n_steps: optimizer steps between prunings.
        initial: sparsity at ``begin_epoch``, in [0, ``final``).
    """

    def __init__(
        self, final: float, begin_epoch: float, end_epoch: float, every_n_steps: int = 100, initial: float = 0.0
    ) -> None:
        _check_share("final", final)
        if not 0 <= begin_epoch < end_epoch:
            raise ValueError(
                f"begin_epoch is {begin_epoch} and end_epoch {end_epoch}: begin at 0 or later, end after it."
            )
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: choose 1 or more.")
        if not 0 <= initial < final:
            raise ValueError(f"initial is {initial}, but it lies between 0 and final ({final}).")
        self.final, self.initial = final, initial
        self.begin_epoch, self.end_epoch, self.every_n_steps = begin_epoch, end_epoch, every_n_steps

    def sparsity_at(self, step: int, steps_per_epoch: float) -> float | None:
        """The sparsity to prune to before optimizer step number ``step``; ``None`` where nothing is pruned."""
        begin, end = round(self.begin_epoch * steps_per_epoch), round(self.end_epoch * steps_per_epoch)
        if not begin <= step <= end or ((step - begin) % self.every_n_steps and step != end):
            return None
        progress = (step - begin) / max(end - begin, 1)
        return self.final + (self.initial - self.final) * (1 - progress) ** 3


def share_to_take(before: float, after: float) -> float:
    """The share of what is left at sparsity ``before`` whose loss brings sparsity ``after``."""
    return max(0.0, 1 - (1 - after) / (1 - before))


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} has {share}, but it is a share that goes: choose a number between 0 and 1.")
