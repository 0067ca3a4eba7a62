"""The plan that removes slots from a net, and the masked net that it is compared with."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from project.compression.thinning.couplings import Couplings
from project.compression.thinning.cuts import Cut, Plain
from project.compression.thinning.masked import MaskedNet
from project.compression.thinning.slots import Split
from project.compression.thinning.thin import Slices, Thin

Gone = np.ndarray[Any, np.dtype[np.bool_]]
"""Whether each slot goes."""


def plan_of(net: nn.Module, c: Couplings, gone: Gone) -> Thin:
    """The plan without the widths of blocks."""
    slices: Slices = {}
    for name, label in c.owned.items():
        if any(axis is not None and gone[axis].any() for axis in label):
            slices[name] = [
                np.flatnonzero(~gone[axis]).tolist() if axis is not None and gone[axis].any() else None
                for axis in label
            ]
    sizes: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, by_module in (("groups", c.groups), ("num_groups", c.single_groups)):
        for module, axis in by_module.items():
            if gone[axis].any():
                sizes[module][key] = int((~gone[axis]).sum())
    for (module, _), mixing in c.mixing.items():
        norm = net.get_submodule(module)
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.weight is None:
            axes = [mixing.axes[dim] for dim in sorted(mixing.axes)]
            if any(gone[axis].any() for axis in axes) and len(axes) == len(norm.normalized_shape):
                sizes[module]["normalized_shape"] = [int((~gone[axis]).sum()) for axis in axes]
    _sizes_of_views(net, c, gone, sizes)
    return Thin(slices=slices, sizes={**sizes}, cuts=cuts_of(c.cuts, gone))


def cuts_of(known: Iterable[tuple[Cut, Split]], gone: Gone) -> dict[str, list[Plain]]:
    """The new sizes of parts, where the call as it stands would make other parts; by the module's name.

    Args:
        known: the cuts with the slots of their parts.
        gone: whether each slot goes, by the slot's number.
    """
    cuts: dict[str, list[Plain]] = defaultdict(list)
    for cut, split in known:
        sizes = [int((~gone[part]).sum()) for part in split.parts]
        stated = cut.stated if isinstance(cut.stated, int) else [*cut.stated]
        plain = [cut.kind, cut.dim, stated, sizes]
        if any(gone[part].any() for part in split.parts) and not cut.gives(sizes):
            cuts[split.module] += [] if plain in cuts[split.module] else [plain]
    return {**cuts}


def _sizes_of_views(net: nn.Module, c: Couplings, gone: Gone, sizes: dict[str, dict[str, Any]]) -> None:
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
            if whole > old == value and "head" in key and "dim" not in key:
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
    words = (
        "attn_dim",
        "hidden",
        "inner",
        "embed_dim",
        "channels",
        "features",
        "width",
        "all_head_size",
        "chs",
        "out_dim",
    )
    return any(word in key for word in words) and "head_dim" not in key


def masked_of(net: nn.Module, c: Couplings, gone: Gone) -> MaskedNet:
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
