"""The arguments of a class or function that makes a net, as the command line sees them."""

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable
from enum import Enum
from typing import Any

from jsonargparse._parameter_resolvers import get_signature_parameters

_NO_LOG = logging.Logger("signature", logging.CRITICAL + 1)


def find(path: str) -> Any:
    """The object that a dotted path names.

    ``torchvision.models.googlenet`` gives the function, not the module of the same name.

    Raises:
        ImportError, AttributeError: if the path names nothing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return pkgutil.resolve_name(path)  # a method that makes a net


def parameters(maker: Callable[..., Any]) -> dict[str, Any]:
    """The arguments by name, including those that ``**kwargs`` passes on, as far as the code shows them.

    Each has ``annotation`` and ``default``, which are ``inspect.Parameter.empty`` if the code has none.
    """
    method = "__init__" if inspect.isclass(maker) else None
    return {each.name: each for each in get_signature_parameters(maker, method, logger=_NO_LOG)}


def takes_any(maker: Callable[..., Any]) -> bool:
    """Whether ``maker`` has ``**kwargs`` and its code does not show which arguments they may hold."""
    own = inspect.signature(maker).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in own):
        return False
    return set(parameters(maker)) <= {each.name for each in own}


def required(maker: Callable[..., Any]) -> list[str]:
    """The arguments that must be given and cannot be ``None``."""
    return [
        name
        for name, each in parameters(maker).items()
        if each.default is inspect.Parameter.empty
        and not any(word in str(each.annotation) for word in ("None", "Optional", "Any"))
    ]


def left_to_code(maker: Callable[..., Any]) -> set[str]:
    """The arguments whose default must not be written into the configuration; the code of ``maker`` sets it.

    There are three kinds:

    - arguments that a function's ``**kwargs`` passes on, because the function may replace the default that is found;
    - arguments whose default cannot be written as text, such as a ``partial``;
    - arguments that are classes of the type ``Callable[..., nn.Module]``, because their own arguments are unknown.
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
    """Whether YAML can hold a default: a plain value, or a class or function by its name."""
    if inspect.isfunction(default):
        return default.__name__ != "<lambda>"
    return isinstance(default, bool | int | float | str | list | tuple | dict | type | Enum | None)
