"""Thinning: remove output channels and hidden units for good, so that a dense kernel has less to do.

Pruning filters for efficient ConvNets, Li et al. 2017 (arXiv:1608.08710), section 3.1: with a filter goes its feature
map, and with the map the kernels of the next layer that read it. Which layers read it through concatenations, norms
and flattening is found by DepGraph, Fang et al. 2023 (arXiv:2301.12900), in
:mod:`project.compression.thinning.dependency_graph`. Our deviations: which units go is somebody else's decision; and
thinning is exact. The caller has zeroed every parameter of these units, so that they added nothing, and the thinned net
computes what the masked one did, up to the rounding of shorter sums. In eval mode, that is; in training, too, if the
zeros stay.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from project.compression.thinning.dependency_graph import UnitGroup, evaluated_copy, example_images, mask_, trace
from project.models.surgery import register_surgery

_OUT = (("weight", "bias", "running_mean", "running_var"), ("out_channels", "out_features", "num_features"))
_IN = (("weight",), ("in_channels", "in_features"))
_TOLERANCE = 1e-3
"""Of the largest logit. Rounding in float32 stays a hundred times below; a wrong channel comes out far above."""


@dataclass(frozen=True)
class Units:
    """The units of one layer: output channels of a convolution, output features of a linear layer.

    Args:
        num: how many.
        parameters: names of all parameters whose first dimension is these units: weight and bias of the layer, of the
            norms after it, and of the layers coupled to it.
        coupled: names of other layers whose units are the same ones, as where a residual connection adds them up.
        readers: the layers that read them, and how many inputs of theirs each unit is (a flattened channel is several).
    """

    num: int
    parameters: tuple[str, ...]
    coupled: tuple[str, ...]
    readers: dict[str, int]


@register_surgery
@dataclass(frozen=True)
class Thin:
    """Keep some outputs and inputs of some layers, drop the others.

    Parameters whose size changes become new objects without gradients: make the optimizer afterwards.

    Args:
        kept_out: indices that stay of the first dimension of a module's parameters and running statistics.
        kept_in: indices that stay of the second dimension of a layer's weight.
        out_channels: new value of the attribute of this name of blocks that state their width, as Inception's.
    """

    kept_out: dict[str, list[int]]
    kept_in: dict[str, list[int]]
    out_channels: dict[str, int] = field(default_factory=dict)

    def apply_(self, net: nn.Module) -> None:
        """Slice the layers of ``net`` in place.

        Raises:
            ValueError: when ``net`` lacks a layer or one is too small; ``net`` is then as it was.
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
        """The same shapes, for a net whose weights are loaded afterwards: the first so many units in place of those
        chosen, which takes fewer words.
        """
        kept_out, kept_in = (
            {name: list(range(len(kept))) for name, kept in by_name.items()}
            for by_name in (self.kept_out, self.kept_in)
        )
        return Thin(kept_out, kept_in, self.out_channels)


def look_at_units(net: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[str, Units], dict[str, str]]:
    """Units of every convolution and linear layer, by module name, that can be removed exactly; and for each other one
    the reason why not.

    Args:
        net: takes images ``[N, C, H, W]``.
        image_shape: (C, H, W).
    """
    groups, reasons = trace(net, image_shape)
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
    """The first half of :func:`look_at_units`."""
    return look_at_units(net, image_shape)[0]


def why_not(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """The second half of :func:`look_at_units`."""
    return look_at_units(net, image_shape)[1]


def plan_thinning(net: nn.Module, removed: Mapping[str, Sequence[int]], image_shape: tuple[int, int, int]) -> Thin:
    """The surgery that removes units, tried on a copy: there it must do what zeros in :attr:`Units.parameters` do.

    Args:
        net: takes images ``[N, C, H, W]``; stays as it is. Only its structure matters.
        removed: indices of units by layer.
        image_shape: (C, H, W).

    Raises:
        ValueError: for a layer that is not in the net or in :func:`why_not`, an index out of range, a layer that would
            lose all its units, coupled layers that do not lose the same units.
    """
    groups, reasons = trace(net, image_shape)
    gone = {
        layer: _checked(layer, [int(unit) for unit in units], groups, reasons)
        for layer, units in removed.items()
        if len(units)
    }
    gone_out: dict[str, set[int]] = defaultdict(set)
    gone_in: dict[str, set[int]] = defaultdict(set)
    for layer, units in gone.items():
        for other in _coupled(net, layer, groups[layer]):
            if gone.get(other) != units:
                raise ValueError(
                    f"{layer} and {other} share their units, but lose different ones: "
                    f"remove the same indices of both, {sorted(units)} or others."
                )
        for name in groups[layer].outputs:
            gone_out[name] |= units
        for name, pairs in groups[layer].inputs.items():
            gone_in[name] |= {index for unit, index in pairs if unit in units}
    plan = Thin(_kept(net, gone_out, 0), _kept(net, gone_in, 1))
    return Thin(plan.kept_out, plan.kept_in, _try_out(plan, net, gone_out, image_shape)) if gone else plan


def _checked(layer: str, units: list[int], groups: dict[str, UnitGroup], reasons: dict[str, str]) -> set[int]:
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
        raise ValueError(f"all {num} units of {layer} would go, and nothing pass it any more: keep at least one.")
    return set(units)


def _try_out(
    plan: Thin, net: nn.Module, gone_out: dict[str, set[int]], image_shape: tuple[int, int, int]
) -> dict[str, int]:
    """Compare masked and thinned copies on random images; the new widths of the blocks that state theirs."""
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
        except RuntimeError as failure:
            raise ValueError(_not_followed(net, f"it no longer runs ({failure})")) from failure
    if error > _TOLERANCE:
        raise ValueError(_not_followed(net, f"its logits change by {error:.1e} of the largest"))
    return {
        name: new for name, new in new_widths.items() if new != widths[name] == net.get_submodule(name).out_channels
    }


def _not_followed(net: nn.Module, what: str) -> str:
    return (
        f"without these units {type(net).__name__} is not what it was with zeros there: {what}. Its forward pass does "
        "something with channels that the trace can not follow: leave the layers around it out of the thinning."
    )


def _run(net: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, int]]:
    """Logits, and the width of the output of each block that has an attribute ``out_channels``."""
    widths: dict[str, int] = {}
    for name, block in net.named_modules():
        if isinstance(vars(block).get("out_channels"), int) and next(block.children(), None) is not None:
            block.register_forward_hook(lambda block, args, output, name=name: widths.update({name: output.shape[1]}))
    return net(images), widths


def _parameter_names(net: nn.Module, group: UnitGroup) -> tuple[str, ...]:
    return tuple(
        f"{module}.{key}" for module in group.outputs for key, _ in net.get_submodule(module).named_parameters()
    )


def _coupled(net: nn.Module, layer: str, group: UnitGroup) -> tuple[str, ...]:
    layers = (name for name in group.outputs if isinstance(net.get_submodule(name), nn.Conv2d | nn.Linear))
    return tuple(name for name in layers if name != layer)


def _kept(net: nn.Module, gone: dict[str, set[int]], dim: int) -> dict[str, list[int]]:
    sizes = {name: net.get_parameter(f"{name}.weight").shape[dim] for name in gone}
    return {name: [i for i in range(size) if i not in gone[name]] for name, size in sizes.items()}


def _check_fit(net: nn.Module, name: str, kept: list[int], dim: int) -> None:
    try:
        size = net.get_parameter(f"{name}.weight").shape[dim]
    except AttributeError as error:
        raise ValueError(
            f"{type(net).__name__} has no layer {name}: thin the net that the plan was made for."
        ) from error
    if max(kept) >= size:
        raise ValueError(
            f"{name} has {size} {'inputs' if dim else 'units'}, but {max(kept)} is to be kept: "
            "thin a net with the arguments of the one that the plan was made for, and thin it once."
        )


def _keep_(module: nn.Module, kept: list[int], dim: int, tensors: tuple[str, ...], sizes: tuple[str, ...]) -> None:
    """Slice a module's tensors along ``dim`` and correct the sizes it states, in place."""
    for name in tensors:
        tensor = getattr(module, name, None)
        if tensor is not None:
            sliced = tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device))
            if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
                sliced = sliced.contiguous(memory_format=torch.channels_last)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(sliced, tensor.requires_grad) if is_parameter else sliced)
    for name in sizes:
        if hasattr(module, name):
            setattr(module, name, len(kept))
