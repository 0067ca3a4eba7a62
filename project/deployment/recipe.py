"""Build a net from plain values: its class and arguments, as in YAML, and then its surgeries.

A file from a stranger must not choose which code runs. A description may name the nets and layers of
:mod:`project.models`, activations, norms, dropouts and initialisers of torch, and classes of packages that the caller
trusts by name. No other name is looked up or imported. The net is built on torch's meta device, so a description of a
huge net takes no memory. A constructor that computes with the values of tensors cannot run there; the caller may then
build the net with real values.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import project.models as own
from project.frame.trust import UntrustedError
from project.models.signature import find, parameters
from project.models.surgery import replay_

_TORCH = (nn.modules.activation, nn.modules.dropout, nn.modules.batchnorm, nn.modules.instancenorm)
_TORCH_NAMES = {"Identity", "GroupNorm", "LayerNorm"}.union(*(module.__all__ for module in _TORCH))
_MAX_ITEMS = 2000
"""Largest number of parts of a description. Each part may be a block of layers, which takes time to build."""


@dataclass(frozen=True)
class Recipe:
    """A net's class, arguments and surgeries, as plain values.

    Example::

        >>> from project.deployment import Recipe
        >>> arguments = {"num_classes": 2, "image_shape": [1, 8, 8]}
        >>> net = Recipe({"class_path": "project.models.SmallInception", "init_args": arguments}).build()
        >>> next(net.parameters()).device.type
        'meta'

    Args:
        net: class and arguments of the net, ``{"class_path": …, "init_args": {…}, "dict_kwargs": {…}}``, as in a
            configuration.
        surgeries: changes of the net's structure, as :func:`project.compression.to_plain` returns them, in order.
    """

    net: Mapping[str, Any]
    surgeries: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of all classes and functions in the description. The person who wrote it can trust them."""
        return tuple({path.rpartition(".")[0] for path in _texts(self.net) if "." in path})

    def renamed(self, package: str, name: str) -> "Recipe":
        """The same recipe with another name of the package in its class paths.

        Args:
            package: name of the package that class paths begin with, such as ``"acme"``.
            name: name that takes its place, such as ``"project"``.
        """
        return Recipe(_renamed(self.net, f"{package}.", f"{name}."), self.surgeries)

    def build(self, trust: Sequence[str] = (), device: str = "meta") -> nn.Module:
        """Build the net in eval mode, by default on the meta device: its tensors have shapes and no values.

        Args:
            trust: names of packages and modules whose classes and functions may be imported and called.
            device: device of the net's tensors; ``meta``, or ``cpu`` for tensors with values.

        Raises:
            UntrustedError: if the description names a class or function from another place.
            ValueError: if the description does not make a net.
        """
        if _size(self.net) > _MAX_ITEMS:
            raise ValueError(f"the description of the net has more than {_MAX_ITEMS} parts")
        with torch.device(device):
            net = _make(self.net, tuple(filter(None, trust)))
            if not isinstance(net, nn.Module):
                raise ValueError("what it describes is no net")
            replay_(net, self.surgeries)
        return net.eval()


def _make(value: Any, trust: tuple[str, ...], hint: Any = None) -> Any:
    """The object that plain ``value`` describes, for an argument of type ``hint``."""
    wants_function = _is_callable(hint)
    if wants_function and isinstance(value, str):
        return _find(value, trust)
    if isinstance(value, list | tuple):
        items = next(iter(typing.get_args(hint)), None)
        return [_make(item, trust, items) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: _make(item, trust) for key, item in value.items()}
    maker = _find(value["class_path"], trust)
    if not inspect.isclass(maker) and not _returns_net(maker):
        raise ValueError(f"{value['class_path']!r} is neither a class nor a function that says `-> nn.Module`")
    known = parameters(maker)
    given = {**value.get("init_args", {}), **value.get("dict_kwargs", {})}
    arguments = {key: _make(item, trust, _hint(known.get(key))) for key, item in given.items()}
    if arguments.get("device") is not None:
        raise ValueError("its description chooses a device, which is the reader's choice")
    return partial(maker, **arguments) if wants_function else maker(**arguments)


def _find(path: str, trust: tuple[str, ...]) -> Callable[..., Any]:
    """The class or function at a dotted path, if it may be used."""
    module, _, name = str(path).rpartition(".")
    if _is_trusted(path, trust):
        try:
            return find(path)
        except (ImportError, AttributeError, ValueError):
            raise ValueError(f"there is no {path}") from None
    if module.startswith(own.__name__) and name in own.__all__ and name != "Classifier":
        return getattr(own, name)
    if module == "torch.nn" and name in _TORCH_NAMES:
        return getattr(nn, name)
    if module == "torch.nn.init" and name.endswith("_") and not name.startswith("_") and hasattr(nn.init, name):
        return getattr(nn.init, name)
    raise UntrustedError(
        f"its net needs {path}, which is neither of this package nor trusted: name the package that holds it with "
        f"--trust {module or 'PACKAGE'}, if you trust it"
    )


def _hint(parameter: Any) -> Any:
    """The type of an argument. Without an annotation, a default that is callable means the type of a callable."""
    if parameter is None or parameter.annotation is not inspect.Parameter.empty:
        return parameter and parameter.annotation
    return Callable[..., Any] if callable(parameter.default) and parameter.default is not parameter.annotation else None


def _is_trusted(path: str, trust: tuple[str, ...]) -> bool:
    """Whether the caller trusts the module of ``path``, or a package above this module."""
    module = str(path).rpartition(".")[0]
    return any(module == known or module.startswith(f"{known}.") for known in trust)


def _is_callable(hint: Any) -> bool:
    options = (hint, *typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is Callable for option in options)


def _renamed(value: Any, prefix: str, other: str) -> Any:
    """Nested plain values, where each text that begins with a prefix begins with another."""
    if isinstance(value, Mapping):
        return {key: _renamed(item, prefix, other) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(item, prefix, other) for item in value]
    return other + value.removeprefix(prefix) if isinstance(value, str) and value.startswith(prefix) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping | list | tuple):
        items = value.values() if isinstance(value, Mapping) else value
        return [text for item in items for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _size(value: Any) -> int:
    """Number of parts of nested plain values."""
    if isinstance(value, Mapping):
        return 1 + sum(map(_size, value.values()))
    return 1 + sum(map(_size, value)) if isinstance(value, list | tuple) else 1


def _returns_net(maker: Callable[..., Any]) -> bool:
    """Whether the annotation of a function says that it returns a module."""
    try:
        kind = typing.get_type_hints(maker).get("return")
    except (NameError, TypeError):
        return False
    return inspect.isclass(kind) and issubclass(kind, nn.Module)
