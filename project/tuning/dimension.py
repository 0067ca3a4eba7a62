"""One searched key: its values, how a sampler draws them, and which of them a grid takes."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Params = dict[str, Any]
"""A point of the search space as the study stores it: for each key a number or the label of a choice."""
RANGES = ("uniform", "log_uniform", "int", "log_int")
"""Kinds of ranges."""


class Suggests(Protocol):
    """The methods of :class:`optuna.Trial` that a dimension calls."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True)
class Dimension:
    """One searched key and its values: choices or a range.

    Example::

        >>> from project.tuning import Dimension
        >>> rate = Dimension("model.optimizer.init_args.lr", "log_uniform", low=0.01, high=1.0, points=3)
        >>> [round(value, 3) for value in rate.grid()]
        [0.01, 0.1, 1.0]

    Args:
        key: dotted name of the key in the configuration.
        kind: kind of the values: choices, uniform, log_uniform, int or log_int.
        choices: value of each choice, by its label; empty for a range.
        low: lower end of a range, which belongs to it; any number, above 0 for a logarithmic range.
        high: upper end of a range, which belongs to it; any number above ``low``.
        step: distance between two values of a range, above 0. ``None`` means 1 for whole numbers and any real number
            for uniform.
        points: number of values that a grid takes from a range; 1 or more. ``None`` takes all values of ``step``.
        when: conditions of the search, as a list of labels for each other key. The key is searched only if each of
            these other keys has one of its labels. Empty means always.
    """

    key: str
    kind: str
    choices: dict[Any, Any] = field(default_factory=dict)
    low: float = 0
    high: float = 0
    step: float | None = None
    points: int | None = None
    when: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def log(self) -> bool:
        """Whether the range is uniform on a logarithmic scale."""
        return self.kind.startswith("log_")

    @property
    def whole(self) -> bool:
        """Whether the range holds whole numbers only."""
        return self.kind.endswith("int")

    def active(self, params: Params) -> bool:
        """Whether the key is searched at this point, because its conditions hold.

        Args:
            params: values of the keys that were chosen before this one.
        """
        return all(key in params and params[key] in labels for key, labels in self.when.items())

    def suggest(self, trial: Suggests) -> Any:
        """Ask the trial's sampler for a value.

        Args:
            trial: trial of an Optuna study.

        Returns:
            A number, or the label of a choice.
        """
        if self.kind == "choices":
            return trial.suggest_categorical(self.key, list(self.choices))
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.key, low, high, step=step, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def value(self, param: Any) -> Any:
        """The value that the configuration gets.

        Args:
            param: number, or the label of a choice, as the study stores it.
        """
        return self.choices[param] if self.kind == "choices" else param

    def param(self, value: Any) -> Any:
        """The reverse of :meth:`value`: the number or the label that the study stores.

        Args:
            value: value in the configuration.

        Raises:
            ValueError: if it is none of the choices, or outside the range.
        """
        if self.kind == "choices":
            found = [label for label, choice in self.choices.items() if _stands_for(choice, value)]
            if found:
                return found[0]
        elif isinstance(value, int | float) and self.low <= value <= self.high:
            return self._whole(value)
        within = (
            f"one of {', '.join(map(str, self.choices))}" if self.choices else f"from {self.low:g} to {self.high:g}"
        )
        raise ValueError(
            f"baseline: {self.key} is {_name(value)} in the configuration, which is not {within}: widen the space, or "
            "set baseline to false."
        )

    def ends(self) -> list[Any]:
        """All choices, or both ends of the range."""
        return list(self.choices) if self.kind == "choices" else [self._whole(self.low), self._whole(self.high)]

    def grid(self) -> list[Any]:
        """The values that a grid takes: all choices, or points of the range, both ends included.

        Raises:
            ValueError: if a range of real numbers has neither ``points`` nor ``step``.
        """
        if self.kind == "choices":
            return list(self.choices)
        if self.points is None:
            step = self.step or (1 if self.kind == "int" else None)
            if step is None:
                raise ValueError(
                    f"space: a grid needs to know how many points of {self.key} to take: add `points: 5`, for example."
                )
            count = math.floor((self.high - self.low) / step * (1 + 1e-12)) + 1  # rounding must not lose the last one
            return [self._whole(self.low + index * step) for index in range(count)]
        shares = [index / max(self.points - 1, 1) for index in range(1, self.points - 1)]
        if self.log:
            inner = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            inner = [self.low + (self.high - self.low) * share for share in shares]
        ends = [self.low, self.high][: self.points]
        return list(dict.fromkeys(map(self._whole, [ends[0], *inner, *ends[1:]])))

    def _whole(self, value: float) -> float | int:
        return round(value) if self.whole else float(value)


def read_dimension(key: str, spec: Any) -> Dimension:
    """The dimension of a key from its line in YAML.

    Raises:
        ValueError: if the line makes no sense, such as an empty range.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"choices": spec}
    kinds = [kind for kind in ("choices", *RANGES) if kind in options]
    extra = sorted(set(options) - {"choices", *RANGES, "step", "points", "when"})
    if len(kinds) != 1 or extra or not isinstance(options[kinds[0]], list):
        raise ValueError(
            f"space: {key} is {spec!r}: give a list of choices, or one of {', '.join(RANGES)} with [low, high]; step, "
            "points and when are optional."
        )
    kind, given = kinds[0], options[kinds[0]]
    when = dict(options.get("when") or {})
    if kind == "choices":
        if not given:
            raise ValueError(f"space: {key} has no choices: give at least one.")
        return Dimension(key, kind, choices=_label(given), when=when)
    if len(given) != 2 or not all(isinstance(end, int | float) and not isinstance(end, bool) for end in given):
        raise ValueError(f"space: {key} is {kind} {given}: give two numbers, [low, high].")
    low, high = given
    if not low < high:
        raise ValueError(f"space: {key} is {kind} from {low} to {high}, an empty range: put the smaller end first.")
    if kind.startswith("log_") and low <= 0:
        raise ValueError(
            f"space: {key} is {kind} from {low} to {high}, but 0 has no logarithm: start above 0, or choose "
            f"{kind.removeprefix('log_')}."
        )
    step, points = options.get("step"), options.get("points")
    if step is not None and (kind.startswith("log_") or step <= 0):
        raise ValueError(f"space: {key} has step {step}: choose a step above 0, and none for a logarithmic range.")
    if points is not None and (not isinstance(points, int) or points < 1):
        raise ValueError(f"space: {key} has {points} points: choose 1 or more.")
    return Dimension(key, kind, low=low, high=high, step=step, points=points, when=when)


def _label(values: Iterable[Any]) -> dict[Any, Any]:
    """Choices by their labels, which a storage can hold.

    A plain value is its own label. The label of a class is its name with its arguments.
    """
    labels: dict[Any, Any] = {}
    for value in values:
        label = name = _name(value)
        number = 1
        while any(label == known and type(label) is type(known) for known in labels):
            number += 1
            label = f"{name} #{number}"
        labels[label] = value
    return labels


def _name(value: Any) -> Any:
    """The label of one value."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and "class_path" in value:
        args = ", ".join(f"{name}={_name(item)}" for name, item in dict(value.get("init_args") or {}).items())
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name}({args})" if args else name
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(_name(item)) for item in value)}]"
    return json.dumps(value)


def _stands_for(choice: Any, value: Any) -> bool:
    """Whether a choice is the value of a resolved configuration, in which a class has all its arguments."""
    if isinstance(value, Mapping) and "class_path" in value:
        wanted: Any = {"class_path": choice} if isinstance(choice, str) else choice
        if not isinstance(wanted, Mapping) or wanted.get("class_path") != value["class_path"]:
            return False
        args = dict(value.get("init_args") or {})
        return all(name in args and args[name] == item for name, item in (wanted.get("init_args") or {}).items())
    return bool(choice == value and isinstance(choice, bool) == isinstance(value, bool))


def means(given: Any, label: Any, value: Any) -> bool:
    """Whether ``given``, written below ``when``, names the choice with this label and value.

    It may be the label, the value, the class path or the name of the class.
    """
    path = value.get("class_path") if isinstance(value, Mapping) else value
    names = [path, path.rpartition(".")[2]] if isinstance(path, str) else []
    return given in names or (given == label and type(given) is type(label)) or given == value
