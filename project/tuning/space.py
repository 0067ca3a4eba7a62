"""The search space: which keys of a run's configuration are searched, and over what.

Written as YAML below ``space``, one line for a key, whose dotted name is the one that ``project fit --help`` lists::

    model.optimizer.init_args.lr: {log_uniform: [1.0e-3, 1]}          # also uniform, int, log_int
    data.init_args.batch_size: [32, 64, 128]                          # choices
    model.optimizer: [torch.optim.Adam, {class_path: torch.optim.SGD, init_args: {lr: 0.1}}]
    model.optimizer.init_args.momentum: {uniform: [0, 0.99], when: {model.optimizer: SGD}}
    data.init_args.augment.0.init_args.degrees: {choices: [0, 10, 20]}  # an item of a list by its number

``points: N`` says how many points of a range a grid takes, ``step`` makes a range discrete, ``when`` searches a key
only where another has this choice (or one of a list). Uniform on a logarithmic scale, and why random beats a grid where
few keys matter: Bergstra & Bengio 2012, Random search for hyper-parameter optimization (JMLR 13, sec. 4 and fig. 1).
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Params = dict[str, Any]
"""Key -> number, or the label of a choice: what the study keeps."""
_RANGES = ("uniform", "log_uniform", "int", "log_int")
_MANY = 100_000


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


class Space:
    """All searched keys, those that others hang on first.

    Args:
        spec: what stands in YAML below ``space``.

    Raises:
        ValueError: for an empty range, a logarithm through 0, a condition on what is not searched.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        if not spec:
            raise ValueError("space is empty: name at least one key of the configuration and its values.")
        by_depth = sorted(spec, key=lambda key: key.count("."))  # a class before its arguments
        left = {key: _dimension(key, spec[key]) for key in by_depth}
        self.dimensions: list[Dimension] = []
        while left:
            free = next((key for key in left if not any(parent in left for parent in left[key].when)), None)
            if free is None:
                raise ValueError(f"space: the conditions of {', '.join(left)} go round in a circle: remove one `when`.")
            dimension = left.pop(free)
            known = {before.key: before for before in self.dimensions}
            when = {parent: _labels(dimension, parent, known) for parent in dimension.when}
            self.dimensions.append(Dimension(**{**dimension.__dict__, "when": when}))

    def suggest(self, trial: Suggests) -> Params:
        """The next point, as the trial's sampler wants it."""
        return self._walk(lambda dimension: dimension.suggest(trial))

    def grid(self) -> list[Params]:
        """Every point once; keys whose condition does not hold are left out of a point.

        Raises:
            ValueError: for a range without points, or more points than anyone will train.
        """
        points: list[Params] = [{}]
        for dimension in self.dimensions:
            values = dimension.grid()
            points = [new for old in points for new in _spread(dimension, old, values)]
            if len(points) > _MANY:
                raise ValueError(f"space: this grid has more than {_MANY:,} points: take fewer, or sampler random.")
        return points

    def probes(self) -> list[Params]:
        """Few points that hold every choice and both ends of every range at least once."""
        points = [self._walk(lambda dimension: dimension.ends()[0])]
        for chosen in self.dimensions:
            base = next((point for point in points if chosen.active(point)), None)
            if base is None:
                continue
            for end in chosen.ends()[1:]:
                fixed = {**base, chosen.key: end}
                points.append(self._walk(lambda dim, fixed=fixed: fixed.get(dim.key, dim.ends()[0])))  # type: ignore[misc]
        return points

    def values(self, params: Params) -> dict[str, Any]:
        """Labels of choices replaced by what they stand for."""
        return {dim.key: dim.value(params[dim.key]) for dim in self.dimensions if dim.key in params}

    def apply(self, config: Mapping[str, Any], params: Params) -> dict[str, Any]:
        """The configuration with this point's values in place; ``config`` stays as it is."""
        changed = dict(config)
        for key, value in self.values(params).items():
            changed = set_value(changed, key.split("."), value, key)
        return changed

    def check_keys(self, config: Mapping[str, Any]) -> None:
        """Refuse a key that the configuration lacks; below a class that is itself searched, the parser does.

        Raises:
            ValueError: that names the nearest right key.
        """
        known = set(_all_keys(config))
        searched = {dimension.key for dimension in self.dimensions}
        for dimension in self.dimensions:
            parts = dimension.key.split(".")
            above = [".".join(parts[:length]) for length in range(1, len(parts))]
            if dimension.key in known or any(key in searched or _is_open(config, key) for key in above):
                continue
            near = difflib.get_close_matches(dimension.key, sorted(known), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"space: {dimension.key!r} is not in the configuration.{hint}")

    def _walk(self, choose: Callable[[Dimension], Any]) -> Params:
        params: Params = {}
        for dimension in self.dimensions:
            if dimension.active(params):
                params[dimension.key] = choose(dimension)
        return params


def set_value(node: Any, parts: list[str], value: Any, key: str) -> Any:
    """A copy of ``node`` whose item at ``parts`` is ``value``; a class's name takes arguments.

    Raises:
        ValueError: for a number beyond the end of a list.
    """
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise ValueError(f"space: {key!r} names item {head!r} of a list of {len(node)}: they are counted from 0.")
        return [set_value(item, rest, value, key) if n == int(head) else item for n, item in enumerate(node)]
    branch = {"class_path": node} if isinstance(node, str) else dict(node or {})
    branch[head] = set_value(branch.get(head), rest, value, key)
    return branch


def _dimension(key: str, spec: Any) -> Dimension:
    options = dict(spec) if isinstance(spec, Mapping) else {"choices": spec}
    kinds = [kind for kind in ("choices", *_RANGES) if kind in options]
    extra = sorted(set(options) - {"choices", *_RANGES, "step", "points", "when"})
    if len(kinds) != 1 or extra or not isinstance(options[kinds[0]], list):
        raise ValueError(
            f"space: {key} is {spec!r}: give a list of choices, or one of {', '.join(_RANGES)} with [low, high], "
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


def _labels(dimension: Dimension, parent: str, known: Mapping[str, Dimension]) -> list[Any]:
    """The parent's labels that ``when`` means: a choice, its class path, or its class's name."""
    if parent not in known or known[parent].kind != "choices":
        raise ValueError(f"space: {dimension.key} hangs on {parent}, which is not searched by choices.")
    given = dimension.when[parent]
    wanted = given if isinstance(given, list) else [given]
    choices = known[parent].choices
    labels = [label for label, value in choices.items() if any(_means(one, label, value) for one in wanted)]
    if not labels:
        raise ValueError(
            f"space: {dimension.key} is searched when {parent} is {given!r}, which is none of its choices: "
            f"{', '.join(map(str, choices))}."
        )
    return labels


def _means(given: Any, label: Any, value: Any) -> bool:
    path = value.get("class_path") if isinstance(value, Mapping) else value
    names = [path, path.rpartition(".")[2]] if isinstance(path, str) else []
    return given in names or (given == label and type(given) is type(label)) or given == value


def _spread(dimension: Dimension, point: Params, values: list[Any]) -> list[Params]:
    return [{**point, dimension.key: value} for value in values] if dimension.active(point) else [point]


def _all_keys(node: Any, prefix: str = "") -> Iterable[str]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        yield f"{prefix}{name}"
        yield from _all_keys(child, f"{prefix}{name}.")


def _is_open(config: Any, key: str) -> bool:
    """Whether a class stands at ``key`` by its name alone: its arguments are not listed."""
    node = config
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return False
    return isinstance(node, str) and "." in node
