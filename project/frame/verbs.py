"""The Trainer of the command line: Lightning's verbs, and those of every optional room that is there.

A room's verbs are the public methods of the class ``Verbs`` in its file ``verbs.py``. Each becomes a verb of the
command line.
"""

from typing import Any

from project.frame.rooms import optional
from project.frame.trainer import RunTrainer

_ROOMS = ("deployment.verbs", "deployment.benchmark.verbs", "tuning.verbs")
_CLASSES: list[Any] = [room.Verbs for room in map(optional, _ROOMS) if room is not None]


class Trainer(*_CLASSES, RunTrainer):  # type: ignore[misc]
    """Trains, shrinks, measures and deploys; all its arguments are :class:`~project.frame.trainer.RunTrainer`'s."""


VERBS = {
    name: kind.needs_weights
    for kind in _CLASSES
    for name in vars(kind)
    if callable(getattr(kind, name)) and name[0] != "_"
}
"""The rooms' verbs, and whether each needs trained weights."""
