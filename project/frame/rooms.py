"""Optional rooms: folders of the package that a fork may delete. What stays finds them here by their names.

``compression/<technique>``, ``deployment``, ``tuning`` and ``models/kernels`` are optional. The rest of the package,
the core, imports none of them. It asks for a module by name and goes on without it where the folder is gone.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import project


@cache
def optional(name: str) -> ModuleType | None:
    """The module of an optional room, imported; ``None`` where this copy of the package does not have it.

    Args:
        name: dotted name below the package, such as ``"tuning.verbs"``.
    """
    full = project.__name__
    for part in name.split("."):
        full = f"{full}.{part}"
        if find_spec(full) is None:
            return None
    return import_module(full)


class MissingRoomError(ValueError, AttributeError):
    """Something needs a folder that was taken out of the package."""


def needed(name: str, what: str) -> ModuleType:
    """The module of an optional room that something cannot do without.

    Args:
        name: dotted name below the package.
        what: what needs it, as the subject of the error's sentence.

    Raises:
        MissingRoomError: where this copy of the package does not have it.
    """
    module = optional(name)
    if module is None:
        file = name.replace(".", "/")
        raise MissingRoomError(
            f"{what} needs {project.__name__}/{file}.py, which this copy of the package does not have."
        )
    return module


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about a name that nobody knows: ``did you mean widths?``

    Args:
        name: name that was given.
        known: names that are right.
        otherwise: text for a name that is like none of them.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def lazily(homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: imports the module that a name is defined in when the name is first used.

    Args:
        homes: name -> full name of the module that defines it.
    """

    def get(name: str) -> Any:
        if name not in homes:
            names = f"the names are {', '.join(sorted(homes))}"
            raise AttributeError(f"there is no {name}: {nearest(name, homes, names)}")
        return getattr(needed(homes[name].partition(".")[2], name), name)

    return get
