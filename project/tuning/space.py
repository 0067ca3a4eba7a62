"""The search space: which keys of a run's configuration are searched, and over which values.

It is written in YAML below ``space``, with one line for each key. The keys are the dotted names that
``project fit --help`` lists::

    model.optimizer.init_args.lr: {log_uniform: [1.0e-3, 1]}          # also uniform, int, log_int
    data.init_args.batch_size: [32, 64, 128]                          # choices
    model.optimizer: [torch.optim.Adam, {class_path: torch.optim.SGD, init_args: {lr: 0.1}}]
    model.optimizer.init_args.momentum: {uniform: [0, 0.99], when: {model.optimizer: SGD}}
    data.init_args.augment.0.init_args.degrees: {choices: [0, 10, 20]}  # an item of a list, by its number from 0

``points: N`` is the number of values that a grid takes from a range. ``step`` makes a range discrete. ``when`` searches
a key only if another key has this choice, or one of a list of choices. Bergstra & Bengio 2012, Random search for
hyper-parameter optimization (JMLR 13, sec. 4 and fig. 1), draw uniformly on a logarithmic scale, and explain why random
search beats a grid if few keys matter.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from project.tuning.dimension import Dimension, Params, Suggests, means, read_dimension

_MANY = 100_000
"""Largest number of points of a grid."""


class Space:
    """All searched keys. A key stands after the keys that its ``when`` names.

    Example::

        >>> from project.tuning import Space
        >>> space = Space({"model.net.width": [0.5, 1.0], "trainer.max_epochs": {"int": [10, 30], "step": 10}})
        >>> len(space.grid())
        6
        >>> space.apply({"model": {"net": {"width": 2.0}}}, {"model.net.width": 0.5})
        {'model': {'net': {'width': 0.5}}}

    Args:
        spec: values of each searched key, as in YAML below ``space``; at least one key.

    Raises:
        ValueError: if a range is empty, a logarithmic range holds 0, or a ``when`` names a key that is not searched.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        if not spec:
            raise ValueError("space is empty: name at least one key of the configuration and its values.")
        by_depth = sorted(spec, key=lambda key: key.count("."))  # fewer dots first: a class before its arguments
        left = {key: read_dimension(key, spec[key]) for key in by_depth}
        self.dimensions: list[Dimension] = []
        while left:
            free = next((key for key in left if not any(parent in left for parent in left[key].when)), None)
            if free is None:
                raise ValueError(f"space: the conditions of {', '.join(left)} form a circle: remove one `when`.")
            dimension = left.pop(free)
            known = {before.key: before for before in self.dimensions}
            when = {parent: _labels(dimension, parent, known) for parent in dimension.when}
            self.dimensions.append(replace(dimension, when=when))

    def suggest(self, trial: Suggests) -> Params:
        """The next point, from the trial's sampler.

        Args:
            trial: trial of an Optuna study.
        """
        return self._walk(lambda dimension: dimension.suggest(trial))

    def grid(self) -> list[Params]:
        """Every point of the grid once. A point leaves out the keys whose condition does not hold.

        Raises:
            ValueError: if a range of real numbers has neither ``points`` nor ``step``, or there are more than 100,000
                points.
        """
        points: list[Params] = [{}]
        for dimension in self.dimensions:
            values = dimension.grid()
            points = [new for old in points for new in _spread(dimension, old, values)]
            if len(points) > _MANY:
                raise ValueError(f"space: this grid has over {_MANY:,} points: take fewer values, or sampler random.")
        return points

    def probes(self) -> list[Params]:
        """A few points that together hold every choice and both ends of every range."""
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
        """The values for the configuration: each label is replaced by its choice.

        Args:
            params: point of the space, as the study stores it.
        """
        return {dim.key: dim.value(params[dim.key]) for dim in self.dimensions if dim.key in params}

    def apply(self, config: Mapping[str, Any], params: Params) -> dict[str, Any]:
        """A copy of the configuration that has this point's values.

        Args:
            config: resolved configuration of a run; it does not change.
            params: point of the space, as the study stores it.
        """
        changed = dict(config)
        for key, value in self.values(params).items():
            changed = set_value(changed, key.split("."), value, key)
        return changed

    def point_of(self, config: Mapping[str, Any]) -> Params:
        """The point with the values that a configuration already has.

        Args:
            config: resolved configuration of a run.

        Raises:
            ValueError: if a value is outside the space.
        """
        return self._walk(lambda dimension: dimension.param(_value_at(config, dimension.key)))

    def check_keys(self, config: Mapping[str, Any]) -> None:
        """Refuse a key that the configuration does not have.

        Keys below a class that is searched itself are not checked here. The parser checks them.

        Args:
            config: resolved configuration of a run.

        Raises:
            ValueError: if a key is missing; it names the nearest key that exists.
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
        """A point: ``choose`` gives the value of each key whose condition holds."""
        params: Params = {}
        for dimension in self.dimensions:
            if dimension.active(params):
                params[dimension.key] = choose(dimension)
        return params


def set_value(node: Any, parts: list[str], value: Any, key: str) -> Any:
    """A copy of ``node`` whose item at ``parts`` is ``value``.

    A class that is given by its name alone becomes a mapping, so that it can take arguments.

    Raises:
        ValueError: if an item's number is beyond the end of its list.
    """
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise ValueError(
                f"space: {key!r} names item {head!r} of a list of {len(node)} items, which are counted from 0: name "
                "one of them."
            )
        return [set_value(item, rest, value, key) if n == int(head) else item for n, item in enumerate(node)]
    branch = {"class_path": node} if isinstance(node, str) else dict(node or {})
    branch[head] = set_value(branch.get(head), rest, value, key)
    return branch


def _labels(dimension: Dimension, parent: str, known: Mapping[str, Dimension]) -> list[Any]:
    """The labels of the parent's choices that ``when`` names, by label, value, class path or name of the class."""
    if parent not in known or known[parent].kind != "choices":
        raise ValueError(
            f"space: {dimension.key} has a `when` on {parent}, which is not searched by choices: give {parent} a list "
            "of choices, or remove the `when`."
        )
    given = dimension.when[parent]
    wanted = given if isinstance(given, list) else [given]
    choices = known[parent].choices
    labels = [label for label, value in choices.items() if any(means(one, label, value) for one in wanted)]
    if not labels:
        raise ValueError(
            f"space: {dimension.key} is searched when {parent} is {given!r}, which is none of its choices: choose from "
            f"{', '.join(map(str, choices))}."
        )
    return labels


def _spread(dimension: Dimension, point: Params, values: list[Any]) -> list[Params]:
    """The point with each value of the key, or the point alone if the key's condition does not hold."""
    return [{**point, dimension.key: value} for value in values] if dimension.active(point) else [point]


def _all_keys(node: Any, prefix: str = "") -> Iterable[str]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        yield f"{prefix}{name}"
        yield from _all_keys(child, f"{prefix}{name}.")


def _is_open(config: Any, key: str) -> bool:
    """Whether the value at ``key`` is a class given by its name alone, so that its arguments are not listed."""
    node = _value_at(config, key)
    return isinstance(node, str) and "." in node


def _value_at(config: Any, key: str) -> Any:
    """The value at a dotted key; ``None`` if there is none."""
    node = config
    for part in key.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return None
    return node
