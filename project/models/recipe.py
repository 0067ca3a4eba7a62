"""How a net is built again from plain values: class and arguments as YAML writes them, then the surgeries.

What a file says is not to be trusted with choosing what code runs. A description may name the nets and layers of
:mod:`project.models`, activations, norms, dropouts and initialisers of torch, and classes of packages that the caller
trusts by name; nothing else is looked up, let alone imported. The net is built on torch's meta device, so that
arguments that ask for a huge net ask for no memory.
"""

import importlib
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
from project.compression import replay_

_TORCH = (nn.modules.activation, nn.modules.dropout, nn.modules.batchnorm, nn.modules.instancenorm)
_TORCH_NAMES = {"Identity", "GroupNorm", "LayerNorm"}.union(*(module.__all__ for module in _TORCH))
_MAX_ITEMS = 2000
"""Of all lists and arguments together: each may stand for a block of layers, which takes a while to build."""


class UntrustedError(ValueError):
    """A description names code that nobody said may run."""


@dataclass(frozen=True)
class Recipe:
    """A net's class, arguments and surgeries, as plain values.

    Args:
        net: ``{"class_path": …, "init_args": {…}}``, as in a configuration.
        surgeries: of :func:`project.compression.to_plain`, in their order.
    """

    net: Mapping[str, Any]
    surgeries: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of all that it names, for whoever wrote it and trusts them."""
        return tuple({path.rpartition(".")[0] for path in _texts(self.net) if "." in path})

    def build(self, trust: Sequence[str] = ()) -> nn.Module:
        """The net on the meta device, in eval mode: shapes without values.

        Args:
            trust: packages and modules, by name, whose classes may be imported and called.

        Raises:
            ValueError: for a class or a function from elsewhere, and for what does not make a net.
        """
        if _size(self.net) > _MAX_ITEMS:
            raise ValueError(f"the description of the net has more than {_MAX_ITEMS} parts")
        with torch.device("meta"):
            net = _make(self.net, tuple(filter(None, trust)))
            if not isinstance(net, nn.Module):
                raise ValueError("what it describes is no net")
            replay_(net, self.surgeries)
        return net.eval()


def _make(value: Any, trust: tuple[str, ...], hint: Any = None) -> Any:
    """The object that plain ``value`` stands for where an argument of type ``hint`` is wanted."""
    wants_function = _is_callable(hint)
    if wants_function and isinstance(value, str):
        return _find(value, trust)
    if isinstance(value, list | tuple):
        return [_make(item, trust) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: _make(item, trust) for key, item in value.items()}
    kind = _find(value["class_path"], trust)
    if not inspect.isclass(kind):
        raise ValueError(f"{value['class_path']!r} is no class")
    hints = _hints(kind)
    arguments = {key: _make(item, trust, hints.get(key)) for key, item in value.get("init_args", {}).items()}
    if arguments.get("device") is not None:
        raise ValueError("its description chooses a device, which is the reader's choice")
    return partial(kind, **arguments) if wants_function else kind(**arguments)


def _find(path: str, trust: tuple[str, ...]) -> Callable[..., Any]:
    """The class or function at a dotted path, if it may be used."""
    module, _, name = str(path).rpartition(".")
    if any(module == known or module.startswith(f"{known}.") for known in trust):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
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


def _hints(kind: type) -> dict[str, Any]:
    """Types of a class's arguments, those that it hands on to its bases included."""
    hints: dict[str, Any] = {}
    for base in reversed(inspect.getmro(kind)):
        if "__init__" in vars(base) and base is not object:
            hints |= typing.get_type_hints(base.__init__)  # type: ignore[misc]
    return hints


def _is_callable(hint: Any) -> bool:
    options = (hint, *typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is Callable for option in options)


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
