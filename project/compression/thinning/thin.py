"""Thinning: remove output channels and hidden units for good, so that dense kernels have less to compute.

Pruning filters for efficient ConvNets, Li et al. 2017 (arXiv:1608.08710), section 3.1: if a filter is removed, its
feature map is removed too, and with the map the kernels of the next layer that read it. DepGraph, Fang et al. 2023
(arXiv:2301.12900), finds the layers that read the map through concatenations, norms and flattening
(:mod:`project.compression.thinning.dependency_graph`).

Our deviations: thinning does not choose the units, the caller does. And thinning is exact: the caller has set every
parameter of these units to zero, so that they add nothing. The thinned net then computes what the masked net did, up to
the rounding of shorter sums. This holds in eval mode, and in training if the zeros stay.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from project.compression.thinning.dependency_graph import (
    UnitGroup,
    evaluated_copy,
    example_images,
    mask_,
    random_half,
    trace,
)
from project.models.surgery import register_surgery

# The tensors that are sliced along the units (first line) or along the inputs (second line) of a layer or norm, and the
# attributes that state its size.
_OUT = (("weight", "bias", "running_mean", "running_var"), ("out_channels", "out_features", "num_features"))
_IN = (("weight",), ("in_channels", "in_features"))
_TOLERANCE = 1e-3
"""Allowed change of the logits, as a share of the largest logit.

Rounding errors in float32 are a hundred times smaller. The error of a wrong channel is far larger.
"""


class _DiffersError(Exception):
    """A thinned copy of a net computes something else than the masked one; the message says what."""


@dataclass(frozen=True)
class Units:
    """The units of one layer: the output channels of a convolution, or the output features of a linear layer.

    Example::

        >>> from torch import nn
        >>> from project.compression import units_of
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> units = units_of(net, image_shape=(1, 8, 8))["0"]
        >>> units.num, units.parameters, units.readers
        (8, ('0.weight', '0.bias'), {'3': 16})

    Args:
        num: number of units, 1 or more.
        parameters: names of all parameters whose first dimension is these units: weight and bias of the layer, of the
            norms after it, and of the layers coupled to it.
        coupled: names of other layers that have the same units, for example because a residual connection adds them
            together.
        readers: the layers that read the units, each with the number of its inputs that one unit fills (1, or several
            if a channel is flattened).
    """

    num: int
    parameters: tuple[str, ...]
    coupled: tuple[str, ...]
    readers: dict[str, int]


@register_surgery
@dataclass(frozen=True)
class Thin:
    """Keeps some outputs and inputs of some layers, and removes the others.

    Parameters whose size changes become new objects without gradients, so that the optimizer must be made afterwards.
    :func:`plan_thinning` makes the plan for a net.

    Example::

        >>> from torch import nn
        >>> from project.compression import Thin
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> Thin(kept_out={"0": [0, 2]}, kept_in={"2": [0, 2]}).apply_(net)
        >>> [tuple(parameter.shape) for parameter in net.parameters()]
        [(2, 4), (2,), (2, 2), (2,)]

    Args:
        kept_out: indices, from 0, that stay in the first dimension of a module's parameters and running statistics, by
            the module's name.
        kept_in: indices, from 0, that stay in the second dimension of a layer's weight, by the layer's name.
        out_channels: new width of each block that states its width in an attribute ``out_channels``, as Inception
            blocks do, by the block's name.
    """

    kept_out: dict[str, list[int]]
    kept_in: dict[str, list[int]]
    out_channels: dict[str, int] = field(default_factory=dict)

    def apply_(self, net: nn.Module) -> None:
        """Remove the outputs and inputs from the layers of a net, in place.

        Args:
            net: the net that the plan was made for, or a fresh net with the same arguments.

        Raises:
            ValueError: if a layer is missing or too small; the net is then unchanged.
        """
        for dim, kept_by_name in enumerate((self.kept_out, self.kept_in)):
            for name, kept in kept_by_name.items():
                _check_fit(net, name, kept, dim)
        for name, kept in self.kept_out.items():
            _keep_(net.get_submodule(name), kept, 0, *_OUT)
        for name, kept in self.kept_in.items():
            _keep_(net.get_submodule(name), kept, 1, *_IN)
        for name, width in self.out_channels.items():
            net.get_submodule(name).out_channels = width  # type: ignore[assignment]

    def of_first_units(self) -> "Thin":
        """A plan with the same shapes that keeps the first units of each layer.

        It is for a net whose weights are loaded afterwards. Indices that start at 0 take less space in a file.
        """
        kept_out, kept_in = (
            {name: list(range(len(kept))) for name, kept in by_name.items()}
            for by_name in (self.kept_out, self.kept_in)
        )
        return Thin(kept_out, kept_in, self.out_channels)


def look_at_units(net: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[str, Units], dict[str, str]]:
    """Find the convolutions and linear layers whose units can be removed exactly.

    Args:
        net: a net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.

    Returns:
        The units of each such layer, and for every other convolution or linear layer the reason why its units cannot be
        removed; both by the layer's name.
    """
    groups, reasons = trace(net, image_shape)
    _refuse_what_differs(net, groups, reasons, image_shape)
    units = {
        layer: Units(
            group.num,
            _parameter_names(net, group),
            _coupled(net, layer, group),
            {reader: len(pairs) // group.num for reader, pairs in group.inputs.items()},
        )
        for layer, group in groups.items()
    }
    return units, reasons


def units_of(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Units]:
    """The units of each layer whose units can be removed exactly, by the layer's name. See :func:`look_at_units`.

    Args:
        net: a net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.
    """
    return look_at_units(net, image_shape)[0]


def why_not(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """For each layer whose units cannot be removed exactly, the reason, by the layer's name. See :func:`look_at_units`.

    Args:
        net: a net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.
    """
    return look_at_units(net, image_shape)[1]


def plan_thinning(net: nn.Module, removed: Mapping[str, Sequence[int]], image_shape: tuple[int, int, int]) -> Thin:
    """Plan the surgery that removes units from a net.

    The plan is tried on a copy of the net. Its logits must be those of a copy whose :attr:`Units.parameters` are zero
    for these units.

    Args:
        net: a net that takes images ``[N, C, H, W]``. It is not changed, and only its structure matters.
        removed: numbers of the units to remove, from 0, by the layer's name. Coupled layers must have the same numbers.
        image_shape: shape (C, H, W) of an image.

    Raises:
        ValueError: if a layer is not in the net or cannot be thinned exactly (:func:`why_not`), if there is no such
            unit, if a layer would lose all its units, if coupled layers would lose different units, or if the thinned
            copy computes something else.
    """
    groups, reasons = trace(net, image_shape)
    gone = {
        layer: _checked(layer, [int(unit) for unit in units], groups, reasons)
        for layer, units in removed.items()
        if len(units)
    }
    for layer, units in gone.items():
        for other in _coupled(net, layer, groups[layer]):
            if gone.get(other) != units:
                raise ValueError(
                    f"{layer} and {other} share their units, but lose different ones: "
                    f"remove the same units of both, such as {sorted(units)}."
                )
    plan, gone_out = _plan(net, groups, gone)
    try:
        return Thin(plan.kept_out, plan.kept_in, _try_out(plan, net, gone_out, image_shape)) if gone else plan
    except _DiffersError as difference:
        raise ValueError(
            f"without these units {type(net).__name__} is not what it was with zeros there: {difference}. Its forward "
            "pass does something with channels that the trace can not follow: leave the layers around this operation "
            "out of the thinning."
        ) from difference


def _plan(
    net: nn.Module, groups: Mapping[str, UnitGroup], gone: Mapping[str, set[int]]
) -> tuple[Thin, dict[str, set[int]]]:
    """The plan without the widths of blocks, and for each module the indices to remove in its first dimension.

    A layer that reads several thinned layers, as after a concatenation, collects the inputs of all of them.
    """
    gone_out: dict[str, set[int]] = defaultdict(set)
    gone_in: dict[str, set[int]] = defaultdict(set)
    for layer, units in gone.items():
        for name in groups[layer].outputs:
            gone_out[name] |= units
        for name, pairs in groups[layer].inputs.items():
            gone_in[name] |= {index for unit, index in pairs if unit in units}
    return Thin(_kept(net, gone_out, 0), _kept(net, gone_in, 1)), gone_out


def _refuse_what_differs(
    net: nn.Module, groups: dict[str, UnitGroup], reasons: dict[str, str], image_shape: tuple[int, int, int]
) -> None:
    """Remove the groups whose removal, tried on a copy, changes what the net computes; give the reason instead.

    All groups are tried at once. Only if this fails, they are tried one after the other.
    """
    halves = {layer: random_half(group) for layer, group in groups.items() if group.num > 1}

    def problem(layers: Sequence[str]) -> str:
        plan, gone_out = _plan(net, groups, {layer: halves[layer] for layer in layers})
        try:
            _try_out(plan, net, gone_out, image_shape)
        except _DiffersError as difference:
            return str(difference)
        return ""

    if not halves or not problem(list(halves)):
        return
    good: list[str] = []
    for layer in halves:
        if why := problem([*good, layer]):
            del groups[layer]
            reasons[layer] = f"without some of them the net is not what it was with zeros there: {why}"
        else:
            good.append(layer)


def _checked(layer: str, units: list[int], groups: dict[str, UnitGroup], reasons: dict[str, str]) -> set[int]:
    """The numbers of the units to remove from a layer, if they can be removed.

    Raises:
        ValueError: if the layer or one of the units does not exist or cannot be removed, or if no unit would be left.
    """
    if layer in reasons:
        raise ValueError(f"units of {layer} can not be removed exactly: {reasons[layer]}. Leave this layer out.")
    if layer not in groups:
        raise ValueError(
            f"{layer!r} is no convolution or linear layer of the net: choose among {', '.join(groups) or 'none'}."
        )
    num = groups[layer].num
    if wrong := [unit for unit in units if not 0 <= unit < num]:
        raise ValueError(f"{layer} has no unit {wrong[0]}: its {num} units count from 0 to {num - 1}.")
    if len(set(units)) == num:
        raise ValueError(
            f"all {num} units of {layer} would go, so that nothing could pass through this layer: keep at least one."
        )
    return set(units)


def _try_out(
    plan: Thin, net: nn.Module, gone_out: dict[str, set[int]], image_shape: tuple[int, int, int]
) -> dict[str, int]:
    """Compare a masked and a thinned copy of the net on random images.

    Returns:
        The new width of each block whose attribute ``out_channels`` must change.

    Raises:
        _DiffersError: if the thinned copy does not run, or if its logits differ from those of the masked copy.
    """
    with torch.inference_mode(False), torch.no_grad():
        masked = evaluated_copy(net)
        for name, units in gone_out.items():
            mask_(masked, name, sorted(units))
        thinned = deepcopy(masked)
        plan.apply_(thinned)
        images = example_images(image_shape, batch=2)
        try:
            (expected, widths), (logits, new_widths) = _run(masked, images), _run(thinned, images)
            error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        except Exception as failure:  # whatever the net raises at another width
            raise _DiffersError(f"it no longer runs ({failure})") from failure
    if error > _TOLERANCE:
        raise _DiffersError(f"its logits change by {error:.1e} of the largest")
    # Training may run layers that the trace in eval mode has not seen, such as an auxiliary head.
    if (why := _failure_in_training(thinned, images)) and not _failure_in_training(masked, images):
        raise _DiffersError(f"it no longer runs in training ({why})")
    # Only blocks whose stated width was the width of their output: others mean something else by `out_channels`.
    return {
        name: new for name, new in new_widths.items() if new != widths[name] == net.get_submodule(name).out_channels
    }


def _failure_in_training(net: nn.Module, images: Tensor) -> Exception | None:
    """What a forward pass in train mode raises; ``None`` if it runs. The running statistics of ``net`` change."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            net.train()(images)
    except Exception as failure:  # whatever the net raises at another width
        return failure
    return None


def _run(net: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The logits, and the width of the output of each block that has children and an attribute ``out_channels``."""
    widths: dict[str, int] = {}
    for name, block in net.named_modules():
        if isinstance(vars(block).get("out_channels"), int) and next(block.children(), None) is not None:
            block.register_forward_hook(lambda block, args, output, name=name: widths.update({name: output.shape[1]}))
    return net(images), widths


def _parameter_names(net: nn.Module, group: UnitGroup) -> tuple[str, ...]:
    """The names of all parameters whose first dimension is the group's units."""
    return tuple(
        f"{module}.{key}" for module in group.outputs for key, _ in net.get_submodule(module).named_parameters()
    )


def _coupled(net: nn.Module, layer: str, group: UnitGroup) -> tuple[str, ...]:
    """The names of the other convolutions and linear layers that have the group's units."""
    layers = (name for name in group.outputs if isinstance(net.get_submodule(name), nn.Conv2d | nn.Linear))
    return tuple(name for name in layers if name != layer)


def _kept(net: nn.Module, gone: dict[str, set[int]], dim: int) -> dict[str, list[int]]:
    """For each module, the indices that stay along ``dim`` of its weight if ``gone`` are removed."""
    sizes = {name: net.get_parameter(f"{name}.weight").shape[dim] for name in gone}
    return {name: [i for i in range(size) if i not in gone[name]] for name, size in sizes.items()}


def _check_fit(net: nn.Module, name: str, kept: list[int], dim: int) -> None:
    """Check that a module of this name has all the indices that are to stay.

    Raises:
        ValueError: if there is no such module, or if it is too small.
    """
    try:
        size = net.get_parameter(f"{name}.weight").shape[dim]
    except AttributeError as error:
        raise ValueError(
            f"{type(net).__name__} has no layer {name}, but the plan removes units or inputs of it: thin the net that "
            "the plan was made for."
        ) from error
    if max(kept) >= size:
        raise ValueError(
            f"{name} has {size} {'inputs' if dim else 'units'}, but {max(kept)} is to be kept (numbers start at 0): "
            "thin a net with the arguments of the one that the plan was made for, and thin it once."
        )


def _keep_(module: nn.Module, kept: list[int], dim: int, tensors: tuple[str, ...], sizes: tuple[str, ...]) -> None:
    """Slice a module's tensors along ``dim``, and correct the attributes that state its size, in place."""
    for name in tensors:
        tensor = getattr(module, name, None)
        if tensor is not None:
            sliced = tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device))
            # `index_select` returns the default memory format; keep channels-last weights channels-last.
            if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
                sliced = sliced.contiguous(memory_format=torch.channels_last)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(sliced, tensor.requires_grad) if is_parameter else sliced)
    for name in sizes:
        if hasattr(module, name):
            setattr(module, name, len(kept))
