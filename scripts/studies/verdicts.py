"""Claims, and the verdicts on them from numbers of several seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Answer = Literal["reproduced", "mixed", "not reproduced"]
"""A verdict on a claim."""


@dataclass(frozen=True)
class Claim:
    """A sentence of advice.

    Args:
        text: the claim, as practitioners say it.
        source: paper and section.
    """

    text: str
    source: str


@dataclass(frozen=True)
class Finding:
    """A verdict on one claim.

    Args:
        claim: the claim.
        answer: the verdict.
        because: the numbers that decide it, as one or two sentences.
    """

    claim: Claim
    answer: Answer
    because: str


def spread(values: Sequence[float], digits: int = 2, factor: float = 1.0) -> str:
    """Mean ± standard deviation as text; runs without a number are counted beside it.

    Args:
        values: one number a seed; NaN for a run without result.
        digits: number of digits after the point, 0 or more.
        factor: factor on all values, such as 100 for percent.
    """
    known = [factor * value for value in values if not math.isnan(value)]
    lost = len(values) - len(known)
    if not known:
        return "diverged"
    text = f"{statistics.fmean(known):.{digits}f}"
    text += f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{text} ({lost} of {len(values)} diverged)" if lost else text


def mean(values: Sequence[float]) -> float:
    """The mean of the numbers that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def clearly(larger: Sequence[float], smaller: Sequence[float]) -> int:
    """Whether the numbers of one arm are larger than those of another, seed by seed.

    Args:
        larger, smaller: one number a seed, in the same order of seeds.

    Returns:
        1 if the mean difference is above two of its standard errors, -1 if it is below minus two, else 0.
    """
    differences = [a - b for a, b in zip(larger, smaller, strict=True) if not math.isnan(a - b)]
    if len(differences) < 2:
        return 0
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    centre = statistics.fmean(differences)
    return (centre > 2 * error) - (centre < -2 * error)


def verdict(signs: Sequence[int]) -> Answer:
    """The verdict from the signs of all decisive settings: all, some or none of them are 1."""
    if signs and all(sign == 1 for sign in signs):
        return "reproduced"
    return "mixed" if any(sign == 1 for sign in signs) else "not reproduced"
