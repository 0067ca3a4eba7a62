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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from project.tuning.dimension import Dimension, Params, Suggests, means, read_dimension

_MANY = 100_000


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
        left = {key: read_dimension(key, spec[key]) for key in by_depth}
        self.dimensions: list[Dimension] = []
        while left:
            free = next((key for key in left if not any(parent in left for parent in left[key].when)), None)
            if free is None:
                raise ValueError(f"space: the conditions of {', '.join(left)} go round in a circle: remove one `when`.")
            dimension = left.pop(free)
            known = {before.key: before for before in self.dimensions}
            when = {parent: _labels(dimension, parent, known) for parent in dimension.when}
            self.dimensions.append(replace(dimension, when=when))

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

    def point_of(self, config: Mapping[str, Any]) -> Params:
        """The point that a configuration stands at already.

        Raises:
            ValueError: when it is outside the space.
        """
        return self._walk(lambda dimension: dimension.param(_value_at(config, dimension.key)))

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


def _labels(dimension: Dimension, parent: str, known: Mapping[str, Dimension]) -> list[Any]:
    """The parent's labels that ``when`` means: a choice, its class path, or its class's name."""
    if parent not in known or known[parent].kind != "choices":
        raise ValueError(f"space: {dimension.key} hangs on {parent}, which is not searched by choices.")
    given = dimension.when[parent]
    wanted = given if isinstance(given, list) else [given]
    choices = known[parent].choices
    labels = [label for label, value in choices.items() if any(means(one, label, value) for one in wanted)]
    if not labels:
        raise ValueError(
            f"space: {dimension.key} is searched when {parent} is {given!r}, which is none of its choices: "
            f"{', '.join(map(str, choices))}."
        )
    return labels


def _spread(dimension: Dimension, point: Params, values: list[Any]) -> list[Params]:
    return [{**point, dimension.key: value} for value in values] if dimension.active(point) else [point]


def _all_keys(node: Any, prefix: str = "") -> Iterable[str]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        yield f"{prefix}{name}"
        yield from _all_keys(child, f"{prefix}{name}.")


def _is_open(config: Any, key: str) -> bool:
    """Whether a class stands at ``key`` by its name alone: its arguments are not listed."""
    node = _value_at(config, key)
    return isinstance(node, str) and "." in node


def _value_at(config: Any, key: str) -> Any:
    """``None`` where nothing is."""
    node = config
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return None
    return node
