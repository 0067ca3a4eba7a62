"""Optional rooms: folders of the package that a fork may delete. The rest of the package asks for them here by name.

``compression/<technique>``, ``deployment``, ``tuning``, ``callbacks/observe``, ``data/sets``, ``metrics/probes``,
``models/kernels`` and ``models/zoo`` are optional. The rest of the package, the core, imports none of them. It asks for
a module by name and goes on without it where the folder is gone.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import project


@cache
def optional(name: str) -> ModuleType | None:
    """Import the module of an optional room; ``None`` if this copy of the package does not have it.

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
    """Something needs a folder that was deleted from the package."""


def needed(name: str, what: str) -> ModuleType:
    """The module of an optional room, for something that cannot work without it.

    Args:
        name: dotted name below the package.
        what: subject of the error's sentence: the thing that needs the module.

    Raises:
        MissingRoomError: if this copy of the package does not have the module.
    """
    module = optional(name)
    if module is None:
        file = name.replace(".", "/")
        raise MissingRoomError(
            f"{what} needs {project.__name__}/{file}.py, which this copy of the package does not have."
        )
    return module


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The hint for an unknown name, such as ``did you mean width?``

    Args:
        name: unknown name that was given.
        known: all names that exist.
        otherwise: text that is returned if no existing name is similar.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def lazily(homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``, which imports the module of a name when the name is first used.

    Args:
        homes: public names, each with the full name of the module that defines it.
    """
    package = sys._getframe(1).f_globals

    def get(name: str) -> Any:
        if name not in homes:
            known = sorted({*homes, *package.get("__all__", ())})
            names = f"the names are {', '.join(known)}"
            raise AttributeError(f"there is no {name}: {nearest(name, known, names)}")
        return getattr(needed(homes[name].partition(".")[2], name), name)

    return get
