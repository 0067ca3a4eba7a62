"""One searched key: its values, how a sampler draws them, which of them a grid takes."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Params = dict[str, Any]
"""Key -> number, or the label of a choice: what the study keeps."""
RANGES = ("uniform", "log_uniform", "int", "log_int")


class Suggests(Protocol):
    """What a key needs of :class:`optuna.Trial`."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True)
class Dimension:
    """One key and its values: choices by label, or a range."""

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
        return self.kind.startswith("log_")

    @property
    def whole(self) -> bool:
        return self.kind.endswith("int")

    def active(self, params: Params) -> bool:
        """Whether the key is searched, given those before it."""
        return all(key in params and params[key] in labels for key, labels in self.when.items())

    def suggest(self, trial: Suggests) -> Any:
        if self.kind == "choices":
            return trial.suggest_categorical(self.key, list(self.choices))
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.key, low, high, step=step, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def value(self, param: Any) -> Any:
        """What goes into the configuration."""
        return self.choices[param] if self.kind == "choices" else param

    def param(self, value: Any) -> Any:
        """What the study keeps of a configuration's value, the reverse of :meth:`value`.

        Raises:
            ValueError: when it is none of the choices, or outside the range.
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
            "leave baseline out."
        )

    def ends(self) -> list[Any]:
        """Every choice, or both ends of the range."""
        return list(self.choices) if self.kind == "choices" else [self._whole(self.low), self._whole(self.high)]

    def grid(self) -> list[Any]:
        """Every choice, or the range's points.

        Raises:
            ValueError: for a range of real numbers without ``points`` or ``step``.
        """
        if self.kind == "choices":
            return list(self.choices)
        if self.points is None:
            step = self.step or (1 if self.kind == "int" else None)
            if step is None:
                raise ValueError(
                    f"space: a grid takes points of {self.key}, but how many does not say: add `points: 5`."
                )
            count = math.floor((self.high - self.low) / step * (1 + 1e-12)) + 1
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
    options = dict(spec) if isinstance(spec, Mapping) else {"choices": spec}
    kinds = [kind for kind in ("choices", *RANGES) if kind in options]
    extra = sorted(set(options) - {"choices", *RANGES, "step", "points", "when"})
    if len(kinds) != 1 or extra or not isinstance(options[kinds[0]], list):
        raise ValueError(
            f"space: {key} is {spec!r}: give a list of choices, or one of {', '.join(RANGES)} with [low, high], "
            "and if you like step, points, when."
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
        raise ValueError(f"space: {key} is {kind} from {low} to {high}, an empty range: give the smaller number first.")
    if kind.startswith("log_") and low <= 0:
        raise ValueError(
            f"space: {key} is {kind} from {low} to {high}, but 0 has no logarithm: start above 0, or take "
            f"{kind.removeprefix('log_')}."
        )
    step, points = options.get("step"), options.get("points")
    if step is not None and (kind.startswith("log_") or step <= 0):
        raise ValueError(f"space: {key} has step {step}: a step is above 0, and a logarithmic range has none.")
    if points is not None and (not isinstance(points, int) or points < 1):
        raise ValueError(f"space: {key} has {points} points: give 1 or more.")
    return Dimension(key, kind, low=low, high=high, step=step, points=points, when=when)


def _label(values: Iterable[Any]) -> dict[Any, Any]:
    """Choices by a short name that storages can keep: plain values as they are, classes by name and arguments."""
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
    """Whether a choice is what a resolved configuration holds, where classes have all their arguments."""
    if isinstance(value, Mapping) and "class_path" in value:
        wanted: Any = {"class_path": choice} if isinstance(choice, str) else choice
        if not isinstance(wanted, Mapping) or wanted.get("class_path") != value["class_path"]:
            return False
        args = dict(value.get("init_args") or {})
        return all(name in args and args[name] == item for name, item in (wanted.get("init_args") or {}).items())
    return bool(choice == value and isinstance(choice, bool) == isinstance(value, bool))


def means(given: Any, label: Any, value: Any) -> bool:
    path = value.get("class_path") if isinstance(value, Mapping) else value
    names = [path, path.rpartition(".")[2]] if isinstance(path, str) else []
    return given in names or (given == label and type(given) is type(label)) or given == value
