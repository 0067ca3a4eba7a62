"""Checks which compression callbacks can be combined in one run, and in which order.

Each callback declares this as data, and :func:`check_company` reads it. No callback needs to know the class of another:
when a technique is added or deleted, the others do not change.

A callback may have two attributes:

- ``stages``: words for what the callback does; other callbacks refer to them. These are in use: ``smaller net`` (the
  weights or layers of the net change for good), ``pruning``, ``low rank``, ``shared weights``,
  ``low bit``, ``integer training``, ``integer file``, ``own teacher``, ``early stopping`` and ``averaged weights``
  (averages of Lightning, which do not follow a net that changes).
- ``company``: a :class:`Company` with the stages that the callback cannot run with and those that must come before or
  after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging


@dataclass(frozen=True)
class Company:
    """The conditions that a callback sets for the other callbacks of its run.

    Each of the three mappings has stages as keys. Its values say the reason and the remedy, as a part of an error
    message that follows the word "but".

    Args:
        never: stages that the callback cannot run with. Empty by default.
        after: stages that have to come before this callback. Empty by default.
        before: stages that have to come after this callback. Empty by default.
    """

    never: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)


def stages_of(callback: Callback) -> tuple[str, ...]:
    """The stages that a callback declares; empty if it declares none.

    Args:
        callback: any callback, also one of Lightning's.
    """
    if isinstance(callback, EarlyStopping):
        return ("early stopping",)
    if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
        return ("averaged weights",)
    return tuple(getattr(callback, "stages", ()))


def check_company(callbacks: Sequence[Callback], own: Callback) -> None:
    """Check that a callback can run with the other callbacks of the run, in the present order.

    Args:
        callbacks: all callbacks of the run, in their order.
        own: callback to check, one of ``callbacks``, with an attribute ``company``.

    Raises:
        ValueError: if there is a callback that ``own`` cannot run with, or one that stands on the wrong side of it.
    """
    company: Company = own.company  # type: ignore[attr-defined]
    name, place = type(own).__name__, callbacks.index(own)
    for number, other in enumerate(callbacks):
        for stage in stages_of(other) if other is not own else ():
            pair = f"{name} and {type(other).__name__}"
            if stage in company.never:
                raise ValueError(f"callbacks hold {pair}, but {company.never[stage]}.")
            if stage in company.after and number > place:
                raise ValueError(f"{name} stands before {type(other).__name__}, but {company.after[stage]}.")
            if stage in company.before and number < place:
                raise ValueError(f"{type(other).__name__} stands before {name}, but {company.before[stage]}.")
