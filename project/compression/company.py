"""Which compression callbacks go together in one run, and in which order.

Each callback declares this as data, and :func:`check_company` reads it. No callback needs to know another one's class:
a technique that is new, or deleted, changes nothing in the others.

A callback may have two attributes:

- ``stages``: words that say what the callback does. Others refer to them. In use are ``smaller net`` (the net's weights
  or layers change for good), ``pruning``, ``units removed at the end``, ``low rank``, ``shared weights``, ``low bit``,
  ``integer training``, ``integer file``, ``own teacher`` and ``early stopping``.
- ``company``: a :class:`Company`, what it cannot run with and what it must stand before or after.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping


@dataclass(frozen=True)
class Company:
    """What a callback asks of the other callbacks of its run.

    Args:
        never: for each stage that the callback cannot run with: the reason, and what to do instead.
        after: for each stage that has to come before this callback: the reason, and what to do instead.
        before: for each stage that has to come after this callback: the reason, and what to do instead.
    """

    never: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)


def stages_of(callback: Callback) -> tuple[str, ...]:
    """The words that a callback declares itself by; empty if it declares none."""
    if isinstance(callback, EarlyStopping):
        return ("early stopping",)
    return tuple(getattr(callback, "stages", ()))


def check_company(callbacks: Sequence[Callback], own: Callback) -> None:
    """Compare what a callback declares with the run's other callbacks.

    Args:
        callbacks: all callbacks of the run, in their order.
        own: one of them, with an attribute ``company``.

    Raises:
        ValueError: for a callback that ``own`` cannot run with, and for one that stands on the wrong side of it.
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
