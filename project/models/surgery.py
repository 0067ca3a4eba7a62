"""Changes of a net's structure (surgeries), saved as plain values from which the structure can be built again.

Some techniques remove channels, factorise a layer or replace its class. The constructor can then no longer build the
net. Such a change is a small frozen dataclass of plain values (names, numbers, lists of them) with a method
``apply_(net)``, which makes the change from these values alone. It works on the net that it was planned for, whose
remaining weights keep their values. It also works on a new net with the same arguments, before weights are loaded.

A checkpoint holds the results of :func:`to_plain` in the order of the changes. To load it, :func:`replay_` comes first,
then ``load_state_dict``. No class is pickled, so ``torch.load(weights_only=True)`` can read the checkpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from project.frame.rooms import optional


class Surgery(Protocol):
    """One change of a net's structure: a frozen dataclass of plain values.

    Example::

        >>> from dataclasses import dataclass
        >>> from torch import nn
        >>> from project.models.surgery import register_surgery, replay_, to_plain
        >>> @register_surgery
        ... @dataclass(frozen=True)
        ... class SkipLayer:
        ...     name: str
        ...     def apply_(self, net): net.set_submodule(self.name, nn.Identity())
        >>> saved, net = [to_plain(SkipLayer("1"))], nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> replay_(net, saved)
        >>> saved, net[1]
        ([{'type': 'SkipLayer', 'name': '1'}], Identity())
    """

    def apply_(self, net: nn.Module) -> None:
        """Make the change on a net in place.

        Parameters that change are replaced by new objects, so the optimizer must be made after this.

        Args:
            net: network to change, with the structure that the change was planned for.
        """


SurgeryClass = TypeVar("SurgeryClass", bound=type)
_CLASSES: dict[str, type] = {}


def register_surgery(cls: SurgeryClass) -> SurgeryClass:
    """Class decorator, above ``@dataclass(frozen=True)``, so that a checkpoint's entry finds the class by its name."""
    assert is_dataclass(cls) and hasattr(cls, "apply_"), f"{cls.__name__} is no dataclass with apply_"
    known = _CLASSES.setdefault(cls.__name__, cls)
    assert (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__), f"two classes {cls.__name__}"
    _CLASSES[cls.__name__] = cls
    return cls


def to_plain(surgery: Surgery) -> dict[str, Any]:
    """The surgery as ``{"type": class name, field: value, ...}``, to be saved. Its values are copies.

    Args:
        surgery: change of structure, of a class with ``@register_surgery``.
    """
    name = type(surgery).__name__
    assert _CLASSES.get(name) is type(surgery), f"{name} lacks @register_surgery"
    values = {field.name: getattr(surgery, field.name) for field in fields(surgery)}  # type: ignore[arg-type]
    return {"type": name, **{key: _plain(value, f"{name}.{key}") for key, value in values.items()}}


def from_plain(plain: Mapping[str, Any]) -> Surgery:
    """The surgery that :func:`to_plain` made ``plain`` of.

    Args:
        plain: the dictionary that :func:`to_plain` returned.

    Raises:
        ValueError: if no class of this type is registered, or if it does not have these fields.
    """
    name, values = plain.get("type"), {key: value for key, value in plain.items() if key != "type"}
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
    """Apply saved surgeries to a new net, in place.

    Args:
        net: network with the structure that it had before the first of the surgeries.
        surgeries: dictionaries that :func:`to_plain` returned, in the order of the changes.

    Raises:
        ValueError: if a surgery is unknown (see :func:`from_plain`), before the net is changed. Also if a surgery does
            not fit the net.
    """
    for surgery in [from_plain(plain) for plain in surgeries]:
        surgery.apply_(net)


def _plain(value: Any, path: str) -> Any:
    """A copy of ``value``. Types must be exact: NumPy's float is a float, but ``weights_only`` cannot read it."""
    if type(value) in (list, tuple):
        return type(value)(_plain(item, path) for item in value)
    if type(value) is dict:
        return {_plain(key, path): _plain(item, path) for key, item in value.items()}
    assert value is None or type(value) in (bool, int, float, str), f"{path} holds a {type(value).__name__}, not plain"
    return value
