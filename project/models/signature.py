"""The arguments of a class or a function that makes a net, as the command line sees them."""

import inspect
import logging
import typing
from collections.abc import Callable
from typing import Any

from jsonargparse._parameter_resolvers import get_signature_parameters
from torch import nn

_NO_LOG = logging.Logger("signature", logging.CRITICAL + 1)


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


def returns_net(maker: Callable[..., Any]) -> bool:
    """Whether a function is annotated to return a module."""
    try:
        kind = typing.get_type_hints(maker).get("return")
    except (NameError, TypeError):
        return False
    return inspect.isclass(kind) and issubclass(kind, nn.Module)
