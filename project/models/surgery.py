"""Changes of a net's structure, as plain values that rebuild it.

Removing channels, factorising a layer or swapping its class gives a net that its constructor no longer builds. Such a
change is a small frozen dataclass of plain values (names, numbers, lists of them) with ``apply_(net)``, which makes the
change from these values alone: on the net it was planned for, whose remaining weights keep their values, and on a
fresh one of the same arguments, before weights are loaded. A checkpoint holds the list of :func:`to_plain` in the
order of the changes; loading is :func:`replay_`, then ``load_state_dict``. No class is pickled, so that
``torch.load(weights_only=True)`` reads it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from project.frame.rooms import optional


class Surgery(Protocol):
    """One change of structure: a frozen dataclass of plain values."""

    def apply_(self, net: nn.Module) -> None:
        """Make the change on ``net`` in place; parameters that change are new objects, so make the optimizer after."""


SurgeryClass = TypeVar("SurgeryClass", bound=type)
_CLASSES: dict[str, type] = {}


def register_surgery(cls: SurgeryClass) -> SurgeryClass:
    """Decorator above ``@dataclass(frozen=True)``: from now on the class is found by its name in checkpoints."""
    assert is_dataclass(cls) and hasattr(cls, "apply_"), f"{cls.__name__} is no dataclass with apply_"
    known = _CLASSES.setdefault(cls.__name__, cls)
    assert (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__), f"two classes {cls.__name__}"
    _CLASSES[cls.__name__] = cls
    return cls


def to_plain(surgery: Surgery) -> dict[str, Any]:
    """``{"type": class name, field: value, ...}``, to be saved; shares nothing with ``surgery``."""
    name = type(surgery).__name__
    assert _CLASSES.get(name) is type(surgery), f"{name} lacks @register_surgery"
    values = {field.name: getattr(surgery, field.name) for field in fields(surgery)}  # type: ignore[arg-type]
    return {"type": name, **{key: _plain(value, f"{name}.{key}") for key, value in values.items()}}


def from_plain(plain: Mapping[str, Any]) -> Surgery:
    """The surgery that :func:`to_plain` was given.

    Raises:
        ValueError: for a type that nothing registered, or fields that this type does not have.
    """
    values = dict(plain)
    name = values.pop("type", None)
    if name not in _CLASSES:
        getattr(optional("compression"), str(name), None)  # imports the technique that has such a surgery
    if name not in _CLASSES:
        raise ValueError(
            f"surgery type {name!r} is unknown (known: {', '.join(sorted(_CLASSES)) or 'none'}): "
            "import the module that defines it, with @register_surgery, before loading."
        )
    try:
        return _CLASSES[name](**values)
    except TypeError as error:
        raise ValueError(
            f"surgery {name} has other fields than the saved {sorted(values)} ({error}): "
            "load it with the version of the code that saved it."
        ) from error


def replay_(net: nn.Module, surgeries: Iterable[Mapping[str, Any]]) -> None:
    """Apply surgeries from :func:`to_plain` to a fresh net, in their order, in place.

    Raises:
        ValueError: as :func:`from_plain`, before the net is touched; and where a surgery does not fit the net.
    """
    for surgery in [from_plain(plain) for plain in surgeries]:
        surgery.apply_(net)


def _plain(value: Any, path: str) -> Any:
    """A copy of ``value``; exact types, since NumPy's float is a float, but not one that ``weights_only`` reads."""
    if type(value) in (list, tuple):
        return type(value)(_plain(item, path) for item in value)
    if type(value) is dict:
        return {_plain(key, path): _plain(item, path) for key, item in value.items()}
    assert value is None or type(value) in (bool, int, float, str), f"{path} holds a {type(value).__name__}, not plain"
    return value
