"""The surgery that removes units from a net for good, so that dense kernels have less to compute.

Pruning filters for efficient ConvNets, Li et al. 2017 (arXiv:1608.08710), section 3.1: if a filter is removed, its
feature map is removed too, and with the map the kernels of the next layer that read it.
:mod:`project.compression.thinning.units` finds everything that goes with a unit, and
:func:`project.compression.thinning.units.plan_thinning` makes the plan for a net.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from project.compression.thinning.attention import ThinAttention
from project.compression.thinning.cuts import Plain, cut_
from project.models.surgery import register_surgery

Kept = list[int] | int | None
"""The indices of a dimension that stay: a list, the first ones (a number), or all (``None``)."""
Slices = dict[str, list[Kept]]
"""What stays of each dimension of a parameter or buffer, by its name."""


@register_surgery
@dataclass(frozen=True)
class Thin:
    """Keeps some indices of some parameters and buffers, and removes the others.

    Parameters whose size changes become new objects without gradients, so that the optimizer must be made afterwards.

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
        slices: indices that stay, by the name of the parameter or buffer, with one entry for each dimension: a list, a
            number n for the first n, or null for all.
        sizes: new values of attributes that state a size, such as ``num_heads``, by the module's name.
        cuts: new sizes of the parts of splits whose sizes are numbers in the source code, by the module's name
            (:mod:`project.compression.thinning.cuts`).
    """

    kept_out: dict[str, list[int]] = field(default_factory=dict)
    kept_in: dict[str, list[int]] = field(default_factory=dict)
    out_channels: dict[str, int] = field(default_factory=dict)
    slices: Slices = field(default_factory=dict)
    sizes: dict[str, dict[str, int | list[int]]] = field(default_factory=dict)
    cuts: dict[str, list[Plain]] = field(default_factory=dict)

    def apply_(self, net: nn.Module) -> None:
        """Remove the indices from the net's parameters and buffers, in place.

        Args:
            net: the net that the plan was made for, or a fresh net with the same arguments.

        Raises:
            ValueError: if a layer is missing or too small; the net is then unchanged.
        """
        slices = self.slices_of(net)
        tensors = {name: _tensor(net, name) for name in slices}
        for name, kept in slices.items():
            _check_fit(net, name, tensors[name], kept)
        new: dict[int, Tensor] = {}  # by the old tensor's id: one new object for a tensor that modules share
        for name, kept in slices.items():
            old = tensors[name]
            assert old is not None
            if id(old) not in new:
                new[id(old)] = sliced(old, kept)
            path, _, key = name.rpartition(".")
            setattr(net.get_submodule(path), key, new[id(old)])
        sizes = {name: {**of_module} for name, of_module in self.sizes.items()}
        for name, width in self.out_channels.items():
            sizes.setdefault(name, {})["out_channels"] = width
        for path in {name.rpartition(".")[0] for name in slices} | {*sizes}:
            _state_sizes_(net.get_submodule(path), sizes.get(path, {}))
        for path, cuts in self.cuts.items():
            cut_(net.get_submodule(path), cuts)
        _forget_(net)

    def slices_of(self, net: nn.Module) -> Slices:
        """All slices by the name of the parameter or buffer, also those of ``kept_out`` and ``kept_in``.

        Args:
            net: net that has the modules of ``kept_out`` and ``kept_in``; it is not changed.
        """
        slices = {name: [*kept] for name, kept in self.slices.items()}
        for place, kept_by_module in enumerate((self.kept_out, self.kept_in)):
            for module, kept in kept_by_module.items():
                keys = ("weight",) if place else ("weight", "bias", "running_mean", "running_var")
                for name in (f"{module}.{key}" for key in keys):
                    tensor = _tensor(net, name)
                    if tensor is not None or name.endswith(".weight"):
                        dims = slices.setdefault(name, [None] * (2 if tensor is None else tensor.dim()))
                        dims[place] = kept
        return slices

    def of_first_units(self) -> "Thin":
        """A plan with the same shapes that keeps the first indices of each dimension.

        It is for a net whose weights are loaded afterwards. Numbers take less space in a file than lists of indices.
        """
        kept_out, kept_in = (
            {name: list(range(len(kept))) for name, kept in by_name.items()}
            for by_name in (self.kept_out, self.kept_in)
        )
        slices: Slices = {
            name: [len(kept) if isinstance(kept, list) else kept for kept in dims] for name, dims in self.slices.items()
        }
        return Thin(kept_out, kept_in, self.out_channels, slices, self.sizes, self.cuts)


def sliced(tensor: Tensor, kept: list[Kept]) -> Tensor:
    """A copy of a tensor with the indices that stay; a parameter if ``tensor`` is one.

    Args:
        tensor: any tensor; it is not changed.
        kept: one entry for each dimension.
    """
    part = tensor.detach()
    for dim, indices in enumerate(kept):
        if isinstance(indices, int):
            part = part.narrow(dim, 0, indices)
        elif indices is not None:
            part = part.index_select(dim, torch.tensor(indices, device=part.device, dtype=torch.long))
    part = part.clone() if part._base is not None or part is tensor else part
    # `index_select` returns the default memory format; keep channels-last weights channels-last.
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        part = part.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _tensor(net: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of this name; ``None`` if there is none."""
    path, _, key = name.rpartition(".")
    try:
        tensor = getattr(net.get_submodule(path), key, None)
    except AttributeError:
        return None
    return tensor if isinstance(tensor, Tensor) else None


def _check_fit(net: nn.Module, name: str, tensor: Tensor | None, kept: list[Kept]) -> None:
    """Check that a tensor has all the indices that are to stay.

    Raises:
        ValueError: if there is no such tensor, or if it is too small.
    """
    if tensor is None or tensor.dim() != len(kept):
        layer = name.rpartition(".")[0] or name
        raise ValueError(
            f"{type(net).__name__} has no layer {layer}, but the plan removes units or inputs of it: thin the net that "
            "the plan was made for."
        )
    for dim, indices in enumerate(kept):
        largest = -1 if indices is None else indices - 1 if isinstance(indices, int) else max(indices)
        if largest >= tensor.shape[dim]:
            raise ValueError(
                f"{name} has {tensor.shape[dim]} indices in dimension {dim}, but {largest} is to be kept (numbers "
                "start at 0): thin a net with the arguments of the one that the plan was made for, and thin it once."
            )


def _forget_(net: nn.Module) -> None:
    """Let modules forget what they computed from their old parameters in evaluation, as they do for training."""
    modes = [(module, module.training) for module in net.modules()]
    net.train()
    net.train(modes[0][1])
    for module, mode in modes:
        module.training = mode


def _state_sizes_(module: nn.Module, sizes: Mapping[str, int | list[int]]) -> None:
    """Correct the attributes that state a module's sizes, after its parameters were sliced."""
    for key, value in sizes.items():
        setattr(module, key, tuple(value) if isinstance(value, list) else value)
    weight: Any = getattr(module, "weight", None)
    stated: dict[str, Any] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        ins, outs = weight.shape[1::-1] if not module.transposed else weight.shape[:2]
        stated = {"in_channels": ins * module.groups, "out_channels": outs}
        if module.transposed:
            stated = {"in_channels": ins, "out_channels": outs * module.groups}
    elif isinstance(module, nn.Linear):
        stated = {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        own = weight if weight is not None else module.running_mean
        stated = {"num_features": module.num_features if own is None else len(own)}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        stated = {"normalized_shape": tuple(weight.shape)}
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        stated = {"num_channels": len(weight)}
    elif isinstance(module, nn.PReLU):
        stated = {"num_parameters": weight.numel()}
    elif type(module) in (nn.MultiheadAttention, ThinAttention):
        assert isinstance(module, nn.MultiheadAttention)
        module.__class__ = ThinAttention
        # torch's TransformerEncoderLayer calls such a layer, and does not read its parameters instead
        stated = {"_qkv_same_embed_dim": False}
        for key, one in (("embed_dim", "q_proj_weight"), ("kdim", "k_proj_weight"), ("vdim", "v_proj_weight")):
            read = module.in_proj_weight if module.in_proj_weight is not None else getattr(module, one)
            stated[key] = read.shape[1]
    for key, value in stated.items():
        setattr(module, key, value)
