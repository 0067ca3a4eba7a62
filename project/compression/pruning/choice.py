"""The layers that are pruned: those that regular expressions choose, in groups of weights or of coupled units."""

import logging
import re
from collections.abc import Mapping, Sequence

from torch import nn

from project.compression.plain_layers import check_weights, name_layers
from project.compression.pruning.masks import Group
from project.compression.thinning.units import look_at_units, trace

log = logging.getLogger(__name__)

_WEIGHT_LAYERS = (nn.Conv2d, nn.Linear)
_UNIT_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


def choose_layers(
    net: nn.Module, patterns: Mapping[str, Sequence[str] | None], *, units: bool
) -> tuple[list[str], Sequence[str]]:
    """The names of the chosen layers, and the regular expressions of those that are not pruned.

    Args:
        net: net with the layers; it is not changed.
        patterns: regular expressions by argument of the pruner. ``include`` null chooses all layers. ``exclude`` null
            leaves out the last layer. The others only have to find a layer.
        units: whether units are pruned, which attention and convolutions of 1 and 3 dimensions have, too.

    Raises:
        ValueError: if an expression finds no layer.
    """
    layers = [
        name for name, layer in net.named_modules() if isinstance(layer, _UNIT_LAYERS if units else _WEIGHT_LAYERS)
    ]
    for argument, given in patterns.items():
        for pattern in given or []:
            if not _finds([pattern], layers):
                raise ValueError(
                    f"{argument} has {pattern!r}, which finds no layer: choose among the layers {_some(layers)}."
                )
    include, exclude = patterns["include"] or [".*"], patterns["exclude"]
    excluded = [f"^{re.escape(name)}$" for name in layers[-1:]] if exclude is None else exclude
    return [name for name in layers if _finds(include, [name]) and not _finds(excluded, [name])], excluded


def groups_of_weights(
    net: nn.Module,
    chosen: Sequence[str],
    excluded: Sequence[str],
    image_shape: tuple[int, int, int],
    *,
    dead_ends: bool,
) -> list[Group]:
    """A group for each chosen layer; none if an excluded layer has the same weight.

    Layers that share a weight are one group. It has the name of the first of them, chosen or not, since that is the
    weight's name in ``named_parameters``.

    Args:
        net: net with the layers; it is not changed.
        chosen: names of the layers in the order of the net.
        excluded: regular expressions of the layers that keep their weights.
        image_shape: shape (C, H, W) of an image.
        dead_ends: whether the groups get their units, and the biases and norms that are pruned with a dead end.

    Raises:
        ValueError: if the weight of a layer is no parameter of its own.
    """
    check_weights(net, chosen, "pruning")
    known = trace(net, image_shape).groups if dead_ends else {}
    layers = [(name, layer.weight) for name, layer in net.named_modules() if isinstance(layer, _WEIGHT_LAYERS)]
    done = {id(weight) for name, weight in layers if _finds(excluded, [name])}
    first = {id(weight): name for name, weight in reversed(layers)}
    groups = []
    for name in chosen:
        if (weight := id(net.get_parameter(f"{name}.weight"))) in done:
            continue
        done.add(weight)
        layer = first[weight]
        units = known.get(layer)
        others = [name for name in units.parameters if net.get_parameter(name).dim() == 1] if units else []
        groups.append(Group(layer, (f"{layer}.weight", *others), units))
    return groups


def groups_of_units(
    net: nn.Module,
    chosen: Sequence[str],
    excluded: Sequence[str],
    image_shape: tuple[int, int, int],
    *,
    named: bool,
) -> list[Group]:
    """The groups of units with a chosen layer and without an excluded one.

    Args:
        net: net with the layers; it is not changed.
        chosen: names of the layers in the order of the net.
        excluded: regular expressions of the layers that keep their units.
        image_shape: shape (C, H, W) of an image.
        named: whether the user has named the chosen layers, so that one that has to stay is an error.

    Raises:
        ValueError: if no chosen layer can lose units, or if one of them cannot and ``named`` is true.
    """
    units, reasons = look_at_units(net, image_shape)
    refused = {name: reasons[name] for name in chosen if name in reasons}
    if refused and len(refused) == len(chosen):
        raise ValueError(
            f"{type(net).__name__} has no layer left whose units can be removed: {name_layers(refused)}. Prune its "
            "weights (structure: weights), or include other layers."
        )
    if refused and named:
        name, reason = next(iter(refused.items()))
        raise ValueError(
            f"units of {name}, which include names, cannot be removed: {reason}. Take this layer out of include, "
            "or add it to exclude."
        )
    if refused:
        log.info("these layers keep their units, which cannot be removed: %s", name_layers(refused))
    return [
        Group(key, tuple(dict.fromkeys(name for name, _ in each.slices if name not in each.buffers)), each)
        for key, each in units.items()
        if not {*each.layers}.isdisjoint(chosen) and not _finds(excluded, each.layers)
    ]


def _finds(patterns: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one of the regular expressions is found in one of the names."""
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def _some(names: Sequence[str]) -> str:
    """The first four names, and the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
