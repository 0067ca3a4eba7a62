"""The units that can be removed from a net, and the plan that removes some of them.

DepGraph: towards any structural pruning, Fang et al. 2023 (arXiv:2301.12900). A unit is a set of slices of parameters
and buffers that only can go together, as :mod:`project.compression.thinning.couplings` finds them: an output channel or
neuron with its bias, the scale and shift of its norm, the filter of a depthwise convolution after it, and the weights
that read it; or a head of attention.

Our addition to the paper is a law: the thinned net computes what the masked net computes
(:mod:`project.compression.thinning.masked`), up to the rounding of shorter sums. Every group of units is tried on a
copy of the net, and a group that breaks the law is refused.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import nn

from project.compression.plain_layers import copy_of
from project.compression.thinning.calls import ModuleStack
from project.compression.thinning.couplings import Couplings
from project.compression.thinning.groups import Units, groups_of
from project.compression.thinning.masked import MaskedNet
from project.compression.thinning.plan import Gone, masked_of, plan_of
from project.compression.thinning.shapes import RULES
from project.compression.thinning.thin import Thin
from project.compression.thinning.trial import DiffersError, evaluated_copy, try_out


@dataclass(frozen=True)
class Traced:
    """A net's units.

    Args:
        groups: all units of each layer that can be removed, by the name of the group's first layer. A layer whose units
            are read by different layers has several groups, the further ones with a number behind the name.
        reasons: reason why the units stay, for each convolution, linear layer or attention without such a group.
        couplings: the slots of the net's parameters.
    """

    groups: dict[str, Units]
    reasons: dict[str, str]
    couplings: Couplings


def trace(net: nn.Module, image_shape: tuple[int, int, int]) -> Traced:
    """Find the units of a net, without trying them out.

    Args:
        net: net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.
    """
    parameters, buffers = [name for name, _ in net.named_parameters()], [name for name, _ in net.named_buffers()]
    tied: set[type[nn.Module]] = set()
    while True:
        couplings = _follow(net, image_shape, tied)
        groups = groups_of(couplings, parameters, buffers)
        left = {name: kind for name, kind in couplings.tieable.items() if kind not in tied}
        if not left or not (failed := _fails_in(net, Traced(groups, {}, couplings), image_shape)):
            break
        tied |= {kind for name, kind in left.items() if failed.startswith(f"{name}.")} or {*left.values()}
    reasons: dict[str, str] = {}
    in_groups = {layer for units in groups.values() for layer in units.layers}
    for name, module in net.named_modules():
        if name not in in_groups and isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.MultiheadAttention):
            reasons[name] = _reason(couplings, name, module)
    return Traced(groups, reasons, couplings)


def look_at_units(net: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[str, Units], dict[str, str]]:
    """Find the layers whose units can be removed.

    Args:
        net: net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.

    Returns:
        The units of each such layer, by the name of the first of the layers that share them; and for every other layer
        the reason why its units cannot be removed, by the layer's name.
    """
    traced = trace(net, image_shape)
    _refuse_what_differs(net, traced, image_shape)
    return traced.groups, traced.reasons


def units_of(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Units]:
    """The units that can be removed, by the name of their first layer. See :func:`look_at_units`.

    Args:
        net: net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.
    """
    return look_at_units(net, image_shape)[0]


def why_not(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """For each layer whose units cannot be removed, the reason, by the layer's name. See :func:`look_at_units`.

    Args:
        net: net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.
    """
    return look_at_units(net, image_shape)[1]


def plan_thinning(net: nn.Module, removed: Mapping[str, Sequence[int]], image_shape: tuple[int, int, int]) -> Thin:
    """Plan the surgery that removes units from a net.

    The plan is tried on a copy of the net. Its logits must be those of the masked net.

    Args:
        net: net that takes images ``[N, C, H, W]``. It is not changed, and only its structure matters.
        removed: numbers of the units to remove, from 0, by the layer's name. What goes with them goes, too: the units
            of coupled layers need not be named.
        image_shape: shape (C, H, W) of an image.

    Raises:
        ValueError: if a layer is not in the net or has units that stay (:func:`why_not`), if there is no such unit, if
            a layer would lose all its units, or if the thinned copy computes something else.
    """
    traced = trace(net, image_shape)
    gone = _gone(net, traced, removed)
    plan = plan_of(net, traced.couplings, gone)
    if not gone.any():
        return plan
    try:
        widths = try_out(plan, net, traced.couplings, gone, image_shape)
    except DiffersError as difference:
        raise ValueError(
            f"without these units {type(net).__name__} is not what it was with zeros there: {difference}. Its forward "
            "pass does something with channels that the trace cannot follow: leave the layers around this operation "
            "out of the thinning."
        ) from difference
    return Thin(out_channels=widths, slices=plan.slices, sizes=plan.sizes, cuts=plan.cuts)


def masked_net(net: nn.Module, removed: Mapping[str, Sequence[int]], image_shape: tuple[int, int, int]) -> MaskedNet:
    """The net with all its sizes in which everything that belongs to the removed units is zero.

    Args:
        net: net that takes images ``[N, C, H, W]``; it is not changed.
        removed: numbers of the units, from 0, by the layer's name.
        image_shape: shape (C, H, W) of an image.

    Raises:
        ValueError: as :func:`plan_thinning` does, but without trying the plan.
    """
    traced = trace(net, image_shape)
    return masked_of(copy_of(net), traced.couplings, _gone(net, traced, removed))


# -- finding the units -----------------------------------------------------------------------------------------------


def _follow(net: nn.Module, image_shape: tuple[int, int, int], tied: Collection[type[nn.Module]]) -> Couplings:
    """Follow the channels on the meta device, or on the CPU if the net reads values."""
    with torch.inference_mode(False):
        try:
            return Couplings(_on_meta(net), image_shape, RULES, tied)
        except Exception:  # whatever a net raises that reads values, such as a number of tokens to keep
            return Couplings(evaluated_copy(net), image_shape, RULES, tied)


def _on_meta(net: nn.Module) -> nn.Module:
    """A copy in eval mode on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*net.parameters(), *net.buffers()):
        made = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made
    return deepcopy(net, memo).eval()


def _fails_in(net: nn.Module, traced: Traced, image_shape: tuple[int, int, int]) -> str:
    """The module that was called last when a copy without some units of each group does not run; else ``""``.

    It is tried without a half of them, and without one, because a wrong width may fit by chance.
    """
    several, device = {layer: units for layer, units in traced.groups.items() if units.num > 1}, traced.couplings.device
    for choose in (random_half, lambda units: [0]):
        gone = _roots(traced, {layer: choose(units) for layer, units in several.items()})
        with torch.inference_mode(False), torch.no_grad():
            copy = _on_meta(net) if device == "meta" else evaluated_copy(net)
            plan_of(net, traced.couplings, gone).apply_(copy)
            stack = ModuleStack(copy)
            try:
                copy(torch.ones(1, *image_shape, device=device))
            except Exception:  # whatever the net raises at another width
                return stack.entered or "."
            finally:
                stack.close()
    return ""


def _reason(c: Couplings, name: str, module: nn.Module) -> str:
    """Why the units of a layer stay."""
    for key, _ in module.named_parameters(recurse=False):
        label = c.owned[f"{name}.{key}"]
        axis = label[1 if getattr(module, "transposed", False) and key == "weight" else 0]
        for root in c.root[axis].tolist() if axis is not None else ():
            if root in c.reasons:
                return c.reasons[root]
    return "the net does not call it in evaluation"


def _refuse_what_differs(net: nn.Module, traced: Traced, image_shape: tuple[int, int, int]) -> None:
    """Remove the groups whose removal, tried on a copy, changes what the net computes; give the reason instead.

    All groups are tried at once. If this fails, the smallest number of first groups that fails shows a culprit: its
    last group. Then the others are tried again.
    """
    halves = {layer: random_half(units) for layer, units in traced.groups.items() if units.num > 1}

    def problem(layers: Iterable[str]) -> str:
        gone = _roots(traced, {layer: halves[layer] for layer in layers})
        try:
            try_out(plan_of(net, traced.couplings, gone), net, traced.couplings, gone, image_shape)
        except DiffersError as difference:
            return str(difference)
        return ""

    layers, num_good, step = [*halves], 0, len(halves)
    while num_good < len(layers) and (why := problem(layers)):
        low, high = num_good, len(layers)  # the first `low` groups are good, the first `high` are not
        while high - low > 1:
            middle = min(low + step, (low + high) // 2)
            if tried := problem(layers[:middle]):
                high, why = middle, tried
            else:
                low, step = middle, len(layers)
        num_good, step = low, 1  # the next culprit may follow at once
        for name in traced.groups.pop(layers.pop(low)).layers:
            traced.reasons[name] = f"without some of them the net is not what it was with zeros there: {why}"


def random_half(units: Units) -> list[int]:
    """The number 0 and a random half of the other units, but not all.

    The choice is random to find wrong offsets in a trace. These are mostly even, and would hide in a regular pattern.

    Args:
        units: units of a layer, two or more.
    """
    draw = Random(units.layers[0])
    chosen = [0, *(unit for unit in range(1, units.num) if draw.random() < 0.5)]
    return chosen[: units.num - 1] if len(chosen) == units.num else chosen


# -- removing some of them -------------------------------------------------------------------------------------------


def _roots(traced: Traced, removed: Mapping[str, Iterable[int]]) -> Gone:
    """Whether each slot goes, if each group loses these units."""
    c = traced.couplings
    gone = np.zeros(c.joined.num, bool)
    for key, numbers in removed.items():
        (name, dim), indices = next(iter(traced.groups[key].slices.items()))
        axis = c.owned[name][dim]
        assert axis is not None
        gone[c.root[axis[indices[list(numbers), 0].numpy()]]] = True
    return gone[c.root]


def _gone(net: nn.Module, traced: Traced, removed: Mapping[str, Sequence[int]]) -> Gone:
    """Whether each slot goes, if each layer loses these outputs.

    Raises:
        ValueError: if a layer or an output does not exist or stays, or if a layer would lose all.
    """
    c = traced.couplings
    gone = np.zeros(c.joined.num, bool)
    for layer, numbers in removed.items():
        numbers = [int(number) for number in numbers]
        if not numbers:
            continue
        if layer in traced.reasons:
            raise ValueError(f"units of {layer} cannot be removed: {traced.reasons[layer]}. Leave this layer out.")
        axis = _outputs(c, traced, layer)
        if axis is None:
            raise ValueError(
                f"{layer!r} is no layer of the net whose units can be removed: choose among "
                f"{', '.join(traced.groups) or 'none'}."
            )
        if wrong := [number for number in numbers if not 0 <= number < len(axis)]:
            raise ValueError(f"{layer} has no unit {wrong[0]}: its {len(axis)} units count from 0 to {len(axis) - 1}.")
        roots = c.root[axis[numbers]]
        if stays := [root for root in roots.tolist() if root in c.reasons]:
            raise ValueError(f"units of {layer} cannot be removed: {c.reasons[stays[0]]}. Leave this layer out.")
        gone[roots] = True
    gone = gone[c.root]
    for name, label in c.owned.items():
        for dim, axis in enumerate(label):
            if axis is not None and len(axis) and gone[axis].all():
                layer = name.rpartition(".")[0]
                raise ValueError(
                    f"all {len(axis)} {'units' if dim == 0 else 'inputs'} of {layer} would go, so that nothing could "
                    "pass through this layer: keep at least one."
                )
    return gone


def _outputs(c: Couplings, traced: Traced, layer: str) -> Any:
    """The slots of a layer's outputs; ``None`` if it is no layer with units that can be removed."""
    if any(layer in units.layers for units in traced.groups.values()):
        for name, label in c.owned.items():
            for axis in label if name.rpartition(".")[0] == layer else ():
                if axis is not None and c.makes[axis].any():
                    return axis
    return None
