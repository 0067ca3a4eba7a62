"""The arguments of a class or a function that makes a net, as the command line sees them."""

import importlib
import inspect
import logging
import pkgutil
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any

from jsonargparse._parameter_resolvers import get_signature_parameters
from torch import nn

_NO_LOG = logging.Logger("signature", logging.CRITICAL + 1)


def find(path: str) -> Any:
    """What a dotted path names: in ``torchvision.models.googlenet`` the function, not the module of the same name.

    Raises:
        ImportError, AttributeError: when there is no such thing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return pkgutil.resolve_name(path)  # a method that makes a net


def parameters(maker: Callable[..., Any]) -> dict[str, Any]:
    """The arguments by name, with those that ``**kwargs`` hands on as far as the code shows them.

    Each has ``annotation`` and ``default``; they are ``inspect.Parameter.empty`` where the code has none.
    """
    method = "__init__" if inspect.isclass(maker) else None
    return {each.name: each for each in get_signature_parameters(maker, method, logger=_NO_LOG)}


def takes_any(maker: Callable[..., Any]) -> bool:
    """Whether ``maker`` has a ``**kwargs`` whose further arguments its code does not show."""
    own = inspect.signature(maker).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in own):
        return False
    return set(parameters(maker)) <= {each.name for each in own}


def required(maker: Callable[..., Any]) -> list[str]:
    """Arguments that have to be given, and not as ``None``."""
    return [
        name
        for name, each in parameters(maker).items()
        if each.default is inspect.Parameter.empty
        and not any(word in str(each.annotation) for word in ("None", "Optional", "Any"))
    ]


def left_to_code(maker: Callable[..., Any]) -> set[str]:
    """Arguments whose default is not to be written down: the code of ``maker`` knows it better.

    These are what a function's ``**kwargs`` hands on, for it may put another value in the place of the default that is
    found; defaults that are no text, such as a ``partial``; and classes that get arguments nobody can list, as the type
    ``Callable[..., nn.Module]`` says.
    """
    own = inspect.signature(maker).parameters
    return {
        name
        for name, each in parameters(maker).items()
        if (name not in own and not inspect.isclass(maker))
        or not _is_text(each.default)
        or (inspect.isclass(each.default) and "Callable[..." in str(each.annotation))
    }


def _is_text(default: Any) -> bool:
    """Whether YAML can hold a default: plain values, and classes and functions by their names."""
    if inspect.isfunction(default):
        return default.__name__ != "<lambda>"
    return isinstance(default, bool | int | float | str | list | tuple | dict | type | Enum | None)


def returns_net(maker: Callable[..., Any]) -> bool:
    """Whether a function is annotated to return a module."""
    try:
        kind = typing.get_type_hints(maker).get("return")
    except (NameError, TypeError):
        return False
    return inspect.isclass(kind) and issubclass(kind, nn.Module)
