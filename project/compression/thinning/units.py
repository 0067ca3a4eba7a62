"""The units that can be removed from a net, and the plan that removes some of them.

DepGraph: towards any structural pruning, Fang et al. 2023 (arXiv:2301.12900). A unit is a set of slices of parameters
and buffers that only can go together, as :mod:`project.compression.thinning.couplings` finds them: an output channel or
neuron with its bias, the scale and shift of its norm, the filter of a depthwise convolution after it, and the weights
that read it; or a head of attention.

Our addition to the paper is a law: the thinned net computes what the masked net computes
(:mod:`project.compression.thinning.masked`), up to the rounding of shorter sums. Every group of units is tried on a
copy of the net, and a group that breaks the law is refused.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from project.compression.plain_layers import copy_of
from project.compression.thinning.couplings import Couplings, ModuleStack, Slots
from project.compression.thinning.masked import MaskedNet
from project.compression.thinning.operations import RULES
from project.compression.thinning.thin import Slices, Thin

Slice = tuple[str, int]
"""The name of a parameter or buffer, and one of its dimensions."""

_TOLERANCE = 1e-3
"""Allowed change of the logits, as a share of the largest logit.

Rounding errors in float32 are a hundred times smaller. The error of a wrong channel is far larger.
"""


class _DiffersError(Exception):
    """A thinned copy of a net computes something else than the masked one; the message says what."""


@dataclass(frozen=True)
class Units:
    """Units of the same kind: they have the same number of indices in the same parameters.

    Example::

        >>> from torch import nn
        >>> from project.compression import units_of
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> units = units_of(net, image_shape=(1, 8, 8))["0"]
        >>> units.num, units.parameters, units.readers
        (8, ('0.weight', '0.bias'), {'3': 16})

    Args:
        layers: names of the layers whose outputs are the units, in the order of the net. There are several if, for
            example, a residual connection adds their outputs together.
        slices: indices of every unit in each dimension of a parameter or buffer, ``[num, indices a unit]``. The
            outputs of the first layer come first.
        read: the slices in which a layer reads the units, and does not make them.
        mixed: whether a norm takes statistics over these units, so that a unit matters even if nothing reads it.
        buffers: names in ``slices`` that are no parameters, such as running statistics.
    """

    layers: tuple[str, ...]
    slices: dict[Slice, Tensor]
    read: frozenset[Slice]
    mixed: bool = False
    buffers: frozenset[str] = frozenset()

    @property
    def num(self) -> int:
        """Number of units, 1 or more."""
        return len(next(iter(self.slices.values())))

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of the other layers with the same units."""
        return self.layers[1:]

    def outputs(self, units: Sequence[int]) -> list[int]:
        """The numbers of the first layer's outputs that are these units: one for a channel, several for a head.

        Args:
            units: numbers of units, each from 0 to below ``num``.
        """
        return next(iter(self.slices.values()))[list(units)].flatten().tolist()

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that belong to the units and do not only read them; the first is a layer's weight."""
        made = (name for name, dim in self.slices if (name, dim) not in self.read and name not in self.buffers)
        return tuple(dict.fromkeys(made))

    @cached_property
    def readers(self) -> dict[str, int]:
        """The layers that read the units, each with the number of its inputs that one unit fills."""
        return {name.rpartition(".")[0]: self.slices[name, dim].shape[1] for name, dim in sorted(self.read)}


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
        groups = _groups(couplings, parameters, buffers)
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
    plan = _plan(net, traced.couplings, gone)
    if not gone.any():
        return plan
    try:
        widths = _try_out(plan, net, traced.couplings, gone, image_shape)
    except _DiffersError as difference:
        raise ValueError(
            f"without these units {type(net).__name__} is not what it was with zeros there: {difference}. Its forward "
            "pass does something with channels that the trace cannot follow: leave the layers around this operation "
            "out of the thinning."
        ) from difference
    return Thin(out_channels=widths, slices=plan.slices, sizes=plan.sizes)


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
    return _masked(copy_of(net), traced.couplings, _gone(net, traced, removed))


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
    """The module that was called last if a copy without a half of each group's units does not run; else ``""``."""
    gone = _roots(traced, {layer: random_half(units) for layer, units in traced.groups.items() if units.num > 1})
    plan, device = _plan(net, traced.couplings, gone), traced.couplings.device
    with torch.inference_mode(False), torch.no_grad():
        copy = _on_meta(net) if device == "meta" else evaluated_copy(net)
        plan.apply_(copy)
        stack = ModuleStack(copy)
        try:
            copy(torch.ones(1, *image_shape, device=device))
        except Exception:  # whatever the net raises at another width
            return stack.entered or "."
        finally:
            stack.close()
    return ""


def _groups(c: Couplings, parameters: Sequence[str], buffers: Sequence[str]) -> dict[str, Units]:
    """Put the sets of slots that can be removed into groups of equal kind."""
    names = (*parameters, *buffers)
    axes = {(name, dim): axis for name in names for dim, axis in enumerate(c.owned[name]) if axis is not None}
    pairs, mixed = list(axes), np.zeros(c.joined.num, bool)
    names_of: dict[int, list[str]] = defaultdict(list)  # all names of a shared tensor, by its label
    for name, label in c.owned.items():
        names_of[id(label)].append(name)
    for mixing in c.mixing.values():
        for axis in mixing.axes.values():
            mixed[c.root[axis]] = True
    groups: dict[str, Units] = {}
    for kind, numbers in _kinds(c, list(axes.values())).items():
        slices: dict[Slice, Tensor] = {}
        read: set[Slice] = set()
        layers: list[str] = []
        made: list[Slice] = []
        begin = 0
        for pair, count in kind:
            (name, dim), axis = pairs[pair], axes[pairs[pair]]
            slices[name, dim] = torch.from_numpy(numbers[:, begin : begin + count].copy())
            begin += count
            if c.makes[axis].any():
                layers += [each.rpartition(".")[0] for each in names_of[id(c.owned[name])]]
                made.append((name, dim))
            elif c.reads[axis].any():
                read.add((name, dim))
        if layers:
            # the outputs of the first layer come first: a net may define what reads them before it
            slices = {made[0]: slices[made[0]], **slices}
            first = axes[pairs[kind[0][0]]][numbers[0, 0]]
            key, number = layers[0], 2
            while key in groups:
                key, number = f"{layers[0]} ({number})", number + 1
            named = tuple(dict.fromkeys(layers))
            of_buffers = frozenset(name for name, _ in slices if name in buffers)
            groups[key] = Units(named, slices, frozenset(read), bool(mixed[c.root[first]]), of_buffers)
    return groups


def _kinds(c: Couplings, axes: Sequence[Slots]) -> dict[tuple[tuple[int, int], ...], Any]:
    """The sets of slots that can be removed, by their kind.

    A kind is the number of indices in each axis, as pairs (number of the axis, number of indices). Its sets are the
    rows of an array, which holds the indices axis after axis.
    """
    slots = np.concatenate([np.zeros(0, int), *axes])
    which = np.repeat(np.arange(len(axes)), [len(axis) for axis in axes])
    index = np.concatenate([np.zeros(0, int), *(np.arange(len(axis)) for axis in axes)])
    roots = c.root[slots]
    free = ~np.isin(roots, np.fromiter(c.reasons, int, len(c.reasons)))
    order = np.flatnonzero(free)[np.lexsort((index[free], which[free], roots[free]))]
    roots, which, index = roots[order], which[order], index[order]
    sets: dict[tuple[tuple[int, int], ...], list[Any]] = defaultdict(list)
    begins = np.flatnonzero(np.diff(roots, prepend=-1)).tolist()
    for begin, end in zip(begins, [*begins[1:], len(roots)], strict=True):
        members, counts = np.unique(which[begin:end], return_counts=True)
        sets[tuple(zip(members.tolist(), counts.tolist(), strict=True))].append(index[begin:end])
    return {kind: np.stack(rows) for kind, rows in sets.items()}


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
            _try_out(_plan(net, traced.couplings, gone), net, traced.couplings, gone, image_shape)
        except _DiffersError as difference:
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


def _roots(traced: Traced, removed: Mapping[str, Iterable[int]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each slot goes, if each group loses these units."""
    c = traced.couplings
    gone = np.zeros(c.joined.num, bool)
    for key, numbers in removed.items():
        (name, dim), indices = next(iter(traced.groups[key].slices.items()))
        axis = c.owned[name][dim]
        assert axis is not None
        gone[c.root[axis[indices[list(numbers), 0].numpy()]]] = True
    return gone[c.root]


def _gone(net: nn.Module, traced: Traced, removed: Mapping[str, Sequence[int]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
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


def _plan(net: nn.Module, c: Couplings, gone: np.ndarray[Any, np.dtype[np.bool_]]) -> Thin:
    """The plan without the widths of blocks."""
    slices: Slices = {}
    for name, label in c.owned.items():
        if any(axis is not None and gone[axis].any() for axis in label):
            slices[name] = [
                np.flatnonzero(~gone[axis]).tolist() if axis is not None and gone[axis].any() else None
                for axis in label
            ]
    sizes: dict[str, dict[str, Any]] = defaultdict(dict)
    for module, axis in c.groups.items():
        if gone[axis].any():
            sizes[module]["groups"] = int((~gone[axis]).sum())
    for module, axis in c.single_groups.items():
        if gone[axis].any():
            sizes[module]["num_groups"] = int((~gone[axis]).sum())
    for (module, _), mixing in c.mixing.items():
        norm = net.get_submodule(module)
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.weight is None:
            axes = [mixing.axes[dim] for dim in sorted(mixing.axes)]
            if any(gone[axis].any() for axis in axes) and len(axes) == len(norm.normalized_shape):
                sizes[module]["normalized_shape"] = [int((~gone[axis]).sum()) for axis in axes]
    _sizes_of_views(net, c, gone, sizes)
    return Thin(slices=slices, sizes={**sizes})


def _sizes_of_views(
    net: nn.Module, c: Couplings, gone: np.ndarray[Any, np.dtype[np.bool_]], sizes: dict[str, dict[str, Any]]
) -> None:
    """New values for the attributes from which a module computes the sizes of its views.

    These are the number of heads, by which a dimension is split, and a width, to which dimensions are joined.
    """
    for view in c.views:
        if not gone[view.slots].any():
            continue
        old, new = len(view.slots), int((~gone[view.slots]).sum())
        whole, shape = int(np.prod(view.sizes)), [*view.shape]
        shape[view.place] = new
        for key, value in vars(net.get_submodule(view.module)).items():
            if isinstance(value, list | tuple) and value and (*value,) == view.shape[-len(value) :]:
                sizes[view.module][key] = shape[-len(value) :]
            if type(value) is not int:
                continue
            if len(view.sizes) > 1 and value == old and "head" in key and "dim" not in key:
                sizes[view.module][key] = new
            elif value in (old, whole) and _states_width(key) and key not in sizes[view.module]:
                sizes[view.module][key] = value // old * new
    for split in c.splits:
        if not any(gone[part].any() for part in split.parts):
            continue
        lengths = [len(part) for part in split.parts]
        lengths_new = [int((~gone[part]).sum()) for part in split.parts]
        new_of = {**dict(zip(lengths, lengths_new, strict=True)), sum(lengths): sum(lengths_new)}
        for key, value in vars(net.get_submodule(split.module)).items():
            if isinstance(value, list | tuple) and [*value] == lengths:
                sizes[split.module][key] = lengths_new
            elif type(value) is int and value in new_of and (_states_width(key) or len({*lengths}) > 1):
                sizes[split.module][key] = new_of[value]


def _states_width(key: str) -> bool:
    """Whether an attribute's name says that it is the width of a layer, and not of one head or of an image."""
    words = ("attn_dim", "hidden", "inner", "embed_dim", "channels", "features", "width", "all_head_size", "chs")
    return any(word in key for word in words) and "head_dim" not in key


def _masked(net: nn.Module, c: Couplings, gone: np.ndarray[Any, np.dtype[np.bool_]]) -> MaskedNet:
    """The masked net of these slots. It is the net itself, which changes."""
    zeros = {
        name: {
            dim: np.flatnonzero(gone[axis]).tolist()
            for dim, axis in enumerate(label)
            if axis is not None and gone[axis].any()
        }
        for name, label in c.owned.items()
    }
    calls = {}
    for key, mixing in c.mixing.items():
        if any(gone[axis].any() for axis in mixing.axes.values()):
            kept = {dim: np.flatnonzero(~gone[axis]).tolist() for dim, axis in mixing.axes.items()}
            num_groups = 0
            if mixing.function == "group_norm":
                single = c.single_groups.get(key[0])
                module = net.get_submodule(key[0])
                num_groups = len(kept[1]) if single is not None else int(getattr(module, "num_groups", 1))
            calls[key] = (kept, num_groups)
    return MaskedNet(net, {name: dims for name, dims in zeros.items() if dims}, calls)


def _try_out(
    plan: Thin,
    net: nn.Module,
    c: Couplings,
    gone: np.ndarray[Any, np.dtype[np.bool_]],
    image_shape: tuple[int, int, int],
) -> dict[str, int]:
    """Compare a masked and a thinned copy of the net on random images.

    Returns:
        The new width of each block whose attribute ``out_channels`` must change.

    Raises:
        _DiffersError: if the thinned copy does not run, or if its logits differ from those of the masked copy.
    """
    with torch.inference_mode(False), torch.no_grad():
        copy = evaluated_copy(net)
        try:
            images, expected, widths = _run_small(_masked(copy, c, gone), copy, image_shape)
            plan.apply_(copy)  # the parts that go are zero in it, and the others are those of the net
            logits, new_widths = _run(copy, copy, images)
            error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        except Exception as failure:  # whatever the net raises at another width
            raise _DiffersError(f"it no longer runs ({failure})") from failure
    if not error <= _TOLERANCE:
        raise _DiffersError(f"its logits change by {error:.1e} of the largest")
    # Training may run layers that the trace in eval mode has not seen, such as an auxiliary head.
    if (why := _failure_in_training(copy, images)) and not _failure_in_training(evaluated_copy(net), images):
        raise _DiffersError(f"it no longer runs in training ({why})")
    # Only blocks whose stated width was the width of their output: others mean something else by `out_channels`.
    return {
        name: new for name, new in new_widths.items() if new != widths[name] == net.get_submodule(name).out_channels
    }


def evaluated_copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32, on the CPU.

    Args:
        net: any net; it is not changed.
    """
    return copy_of(net).cpu().float().eval()


def _run_small(
    net: nn.Module, blocks: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Two random images, small ones if the net takes them, and the results of :func:`_run`.

    No global random number is drawn.
    """
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(0)
    if min(height, width) >= 128:
        small = torch.randn(2, channels, height // 4, width // 4, generator=generator)
        try:
            logits, widths = _run(net, blocks, small)
            if logits.isfinite().all():
                return small, logits, widths
        except Exception:  # the net wants images of one size
            pass
    images = torch.randn(2, *image_shape, generator=generator)
    return images, *_run(net, blocks, images)


def _failure_in_training(net: nn.Module, images: Tensor) -> Exception | None:
    """What a forward pass in train mode raises; ``None`` if it runs. The running statistics of ``net`` change."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            net.train()(images)
    except Exception as failure:  # whatever the net raises at another width
        return failure
    return None


def _run(net: nn.Module, blocks: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The logits, and the width of the output of each block that has children and an attribute ``out_channels``."""
    widths: dict[str, int] = {}
    handles = [
        block.register_forward_hook(lambda block, args, output, name=name: widths.update({name: output.shape[1]}))
        for name, block in blocks.named_modules()
        if isinstance(vars(block).get("out_channels"), int) and next(block.children(), None) is not None
    ]
    try:
        return net(images), widths
    finally:
        for handle in handles:
            handle.remove()
