"""One rule for each operation that changes a tensor's shape or the order of its elements.

:mod:`project.compression.thinning.rules` says what a rule is.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

from project.compression.thinning.couplings import Couplings
from project.compression.thinning.operations import elementwise
from project.compression.thinning.rules import RULES, equal_shares, in_attention, rule, same
from project.compression.thinning.slots import Axis, Label, Slots, Split, View

__all__ = ["RULES"]  # the whole table: the import of this module fills it


@rule("t")
def t(c: Couplings, result: Tensor, x: Tensor) -> Label:
    """The transposed matrix."""
    return c.of(x)[::-1]


@rule("transpose")
def transpose(c: Couplings, result: Tensor, x: Tensor, a: int, b: int) -> Label:
    """Two dimensions change places."""
    label = list(c.of(x))
    label[a], label[b] = label[b], label[a]
    return tuple(label)


@rule("permute")
def permute(c: Couplings, result: Tensor, x: Tensor, dims: Sequence[int]) -> Label:
    """The dimensions change places."""
    return tuple(c.of(x)[dim] for dim in dims)


@rule("unsqueeze")
def unsqueeze(c: Couplings, result: Tensor, x: Tensor, dim: int) -> Label:
    """A new dimension of size 1."""
    label = list(c.of(x))
    label.insert(dim % result.dim(), None)
    return tuple(label)


@rule("squeeze")
def squeeze(c: Couplings, result: Tensor, x: Tensor, dim: Any = None) -> Label:
    """Dimensions of size 1 go."""
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {each % x.dim() for each in dims if x.shape[each] == 1}
    for each in gone:
        c.joined.fix(c.of(x)[each], "it is the only one")
    return tuple(axis for number, axis in enumerate(c.of(x)) if number not in gone)


@rule("expand")
def expand(c: Couplings, result: Tensor, x: Tensor, *_: Any, **__: Any) -> Label:
    """Dimensions of size 1 are repeated without a copy."""
    added = result.dim() - x.dim()
    made: list[Axis] = [None] * added
    for dim, axis in enumerate(c.of(x)):
        spread = axis is not None and x.shape[dim] != result.shape[added + dim]
        if spread:
            c.joined.fix(axis, "it is one channel that is spread over others")
        made.append(None if spread else axis)
    return tuple(made)


@rule("repeat")
def repeat(c: Couplings, result: Tensor, x: Tensor, counts: Sequence[int]) -> Label:
    """A tensor is repeated along its dimensions."""
    added = result.dim() - x.dim()
    axes = zip(c.of(x), counts[added:], strict=True)
    return (*(None,) * added, *(axis if axis is None or n == 1 else np.tile(axis, n) for axis, n in axes))


@rule("cat")
def cat(c: Couplings, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Label:
    """A concatenation."""
    tensors = [each for each in tensors if each.dim() == result.dim()]
    label: list[Axis] = []
    for number in range(result.dim()):
        axes = [c.of(each)[number] for each in tensors]
        if number != dim % result.dim():
            label.append(same(c, axes))
        elif all(axis is None for axis in axes):
            label.append(None)
        else:
            sizes = [each.shape[number] for each in tensors]
            label.append(
                np.concatenate([_known(c, *each, "it is a constant") for each in zip(axes, sizes, strict=True)])
            )
    return tuple(label)


def _known(c: Couplings, axis: Axis, size: int, why: str) -> Slots:
    """The axis; new slots that stay if it is not followed."""
    if axis is None:
        axis = c.joined.new(size)
        c.joined.fix(axis, why)
    return axis


@rule("stack")
def stack(c: Couplings, result: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Label:
    """Tensors side by side along a new dimension."""
    label = list(elementwise(c, tensors[0], *tensors))
    label.insert(dim % result.dim(), None)
    return tuple(label)


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def split(c: Couplings, result: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> list[Label]:
    """A tensor is cut into parts. Equal parts lose the same channels.

    The sizes of others may be stated in attributes of the module, or in its source code.
    """
    label = c.of(x)
    axis = label[dim]
    if axis is None:
        c.cut(())
        return [label] * len(result)
    parts = np.split(axis, np.cumsum([each.shape[dim] for each in result])[:-1])
    lengths = [len(part) for part in parts]
    module = c.net.get_submodule(c.stack.name)
    stated = [*vars(module).values()]
    same_size = len({*lengths}) == 1
    as_list = any(isinstance(each, list | tuple) and [*each] == lengths for each in stated)
    as_numbers = all(any(type(each) is int and each == size for each in stated) for size in lengths)
    is_chunk = c.running_cut is not None and c.running_cut.kind == "chunk"
    is_cut = c.cut(parts, fits=as_list or as_numbers or (same_size and is_chunk))
    if isinstance(module, nn.MultiheadAttention):  # its parts are one third and two thirds
        equal_shares(c, axis, 3)
    elif as_list and not same_size:
        c.splits.append(Split(c.stack.name, tuple(parts)))
    elif same_size or as_numbers:
        first: dict[int, Slots] = {}
        for part in parts:
            c.joined.join(first.setdefault(len(part), part), part)
        c.splits.append(Split(c.stack.name, tuple(parts)))
    elif not is_cut:
        c.joined.fix(axis, f"{c.stack.name or 'the net'} splits it into parts of given sizes")
    place = dim % x.dim()
    return [(*label[:place], part, *label[place + 1 :]) for part in parts]


@rule("glu")
def glu(c: Couplings, result: Tensor, x: Tensor, dim: int = -1) -> Label:
    """One half of the channels gates the other half. Both lose the same channels."""
    label = list(c.of(x))
    axis = label[dim]
    label[dim] = None if axis is None else equal_shares(c, axis, 2)
    return tuple(label)


@rule("unbind")
def unbind(c: Couplings, result: Sequence[Tensor], x: Tensor, dim: int = 0) -> list[Label]:
    """A tensor is taken apart along a dimension."""
    label = list(c.of(x))
    c.joined.fix(label.pop(dim), f"{c.stack.name or 'the net'} takes it apart")
    return [tuple(label)] * len(result)


@rule("select")
def select(c: Couplings, result: Tensor, x: Tensor, dim: int, index: int) -> Label:
    """One index of a dimension."""
    label = list(c.of(x))
    c.joined.fix(label.pop(dim), f"{c.stack.name or 'the net'} takes it by its number")
    return tuple(label)


@rule("slice")
def slice_(
    c: Couplings, result: Tensor, x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Label:
    """A range of a dimension."""
    label = list(c.of(x))
    axis = label[dim]
    if axis is None:
        c.cut(())
    elif c.running_cut is not None or result.shape[dim] != x.shape[dim]:
        label[dim] = kept = axis[slice(start, end, step)]
        begin = slice(start, end, step).indices(len(axis))[0]
        whole = len(kept) == len(axis) != end  # as in x[:, 0:]
        if step != 1 or not c.cut((axis[:begin], kept, axis[begin + len(kept) :]), fits=whole):
            c.joined.fix(axis, f"{c.stack.name or 'the net'} takes a part of them by numbers")
    return tuple(label)


@rule("flip", "roll")
def reorder(c: Couplings, result: Tensor, x: Tensor, *args: Any) -> Label:
    """The order within some dimensions changes."""
    dims = args[-1] if isinstance(args[-1], list | tuple) else [args[-1]]
    for dim in dims:
        c.joined.fix(c.of(x)[dim], f"{c.stack.name or 'the net'} changes its order")
    return c.of(x)


@rule("constant_pad_nd")
def pad(c: Couplings, result: Tensor, x: Tensor, widths: Sequence[int], *_: Any) -> Label:
    """Constants before and after."""
    label = list(c.of(x))
    for number in range(len(widths) // 2):
        dim, (before, after) = -1 - number, widths[2 * number : 2 * number + 2]
        axis = label[dim]
        if axis is None or not (before or after):
            continue
        if before < 0 or after < 0:
            c.joined.fix(axis, f"{c.stack.name or 'the net'} cuts a part of them away")
            label[dim] = None
        else:
            parts = (_known(c, None, width, "it is padding") for width in (before, after))
            label[dim] = np.concatenate([next(parts), axis, next(parts)])
    return tuple(label)


@rule("index")
def index(c: Couplings, result: Tensor, x: Tensor, indices: Sequence[Any]) -> Label:
    """Indices taken by a tensor of numbers."""
    label = c.of(x)
    used = [number for number, each in enumerate(indices) if each is not None]
    for dim in used:
        c.joined.fix(label[dim], f"{c.stack.name or 'the net'} takes it by numbers")
    if used == list(range(used[0], used[-1] + 1)):
        middle = result.dim() - (x.dim() - len(used))
        return (*label[: used[0]], *((None,) * middle), *label[used[-1] + 1 :])
    for axis in label:
        c.joined.fix(axis, f"{c.stack.name or 'the net'} takes it by numbers")
    return (None,) * result.dim()


@rule("index_select")
def index_select(c: Couplings, result: Tensor, x: Tensor, dim: int, numbers: Tensor) -> Label:
    """Indices of one dimension, taken by a tensor of numbers."""
    label = list(c.of(x))
    c.joined.fix(label[dim], f"{c.stack.name or 'the net'} takes it by numbers")
    label[dim] = None
    return tuple(label)


@rule("pixel_shuffle")
def pixel_shuffle(c: Couplings, result: Tensor, x: Tensor, factor: int) -> Label:
    """Channels become pixels."""
    label = c.of(x)
    if label[1] is None:
        return label
    grid = label[1].reshape(-1, factor * factor)
    for column in grid.T[1:]:
        c.joined.join(grid[:, 0], column)
    return label[0], grid[:, 0], None, None


@rule("pixel_unshuffle")
def pixel_unshuffle(c: Couplings, result: Tensor, x: Tensor, factor: int) -> Label:
    """Pixels become channels."""
    label = c.of(x)
    return label[0], None if label[1] is None else np.repeat(label[1], factor * factor), None, None


@rule("im2col")
def im2col(c: Couplings, result: Tensor, x: Tensor, *_: Any) -> Label:
    """The pixels of each window become channels."""
    label = c.of(x)
    return label[0], None if label[1] is None else np.repeat(label[1], result.shape[1] // x.shape[1]), None


@rule("col2im")
def col2im(c: Couplings, result: Tensor, x: Tensor, *_: Any) -> Label:
    """The channels of windows become pixels, and are summed where windows overlap."""
    label = c.of(x)
    if label[1] is None:
        return label[0], None, None, None
    grid = label[1].reshape(result.shape[1], -1)
    for column in grid.T[1:]:
        c.joined.join(grid[:, 0], column)
    return label[0], grid[:, 0], None, None


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(c: Couplings, result: Tensor, x: Tensor, groups: int) -> Label:
    """The channels of several groups take turns."""
    label = list(c.of(x))
    if label[1] is not None:
        equal_shares(c, label[1], groups)
        label[1] = label[1].reshape(groups, -1).T.ravel()
    return tuple(label)


@rule("as_strided")
def as_strided(c: Couplings, result: Tensor, x: Tensor, size: Sequence[int], *_: Any) -> Label | None:
    """Another memory format keeps the shape. Other uses fix the channels."""
    if tuple(size) == tuple(x.shape):
        return c.of(x)
    for axis in c.of(x):
        c.joined.fix(axis, f"it passes through as_strided in {c.stack.name or 'the net'}")
    return None


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(c: Couplings, result: Tensor, x: Tensor, *_: Any) -> Label:
    """Another shape for the same elements.

    The dimensions fall into blocks with equal numbers of elements before and after. Each block is treated on its own.
    """
    label, old, new = c.of(x), tuple(x.shape), tuple(result.shape)
    made: list[Axis] = [None] * len(new)
    if all(axis is None for axis in label):
        return tuple(made)
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        a = old[i] if i < len(old) else 1
        b = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while a != b:
            if a < b:
                a *= old[i]
                i += 1
            else:
                b *= new[j]
                j += 1
        made[j0:j] = _block(c, label[i0:i], old[i0:i], new, j0, j)
    return tuple(made)


def _block(c: Couplings, axes: Label, old: tuple[int, ...], shape: tuple[int, ...], begin: int, end: int) -> list[Axis]:
    """The new axes of one block of a view: the dimensions ``begin`` to ``end`` of the new shape."""
    new = shape[begin:end]
    made: list[Axis] = [None] * len(new)
    known = [number for number, axis in enumerate(axes) if axis is not None and old[number] > 1]
    if not known:
        one = next((axis for axis in axes if axis is not None), None)
        if one is not None and 1 in new:
            made[new.index(1)] = one
        else:
            c.joined.fix(one, "it is one channel that a view hides")
        return made
    for number in known[1:]:
        c.joined.fix(axes[number], "a view joins it with other channels")
    first = axes[known[0]]
    assert first is not None
    grid = first.reshape([-1 if number == known[0] else 1 for number in range(len(old))])
    slots = np.broadcast_to(grid, old).reshape(new)
    varying = [dim for dim in range(len(new)) if new[dim] > 1 and (slots != slots.take([0], axis=dim)).any()]
    if not varying:
        c.joined.fix(first, "all of its units would have to go together")
        made[int(np.argmax(new))] = np.full(max(new), slots.flat[0])
        return made
    single = len(varying) == 1 and len(old) == 1 and 1 in new[: varying[0]] and 1 in _heads(c)
    if single and not in_attention(c):
        c.joined.fix(first, "all of them are one head")
    free = varying[0] if len(varying) == 1 else _free(c, new, varying)
    made[free] = slots[tuple(slice(None) if dim == free else 0 for dim in range(len(new)))]
    rows = np.moveaxis(slots, free, -1).reshape(-1, new[free])
    if len(varying) > 1:
        for row in rows[1:]:
            c.joined.join(rows[0], row)
    size = int(np.prod([new[dim] for dim in varying if dim > free]))
    c.tie(rows[0], size)
    if size > 1:
        c.head_cuts.add((new[free], size))
    c.views.append(View(c.stack.name, new, free, np.ascontiguousarray(rows[0]), shape, begin + free))
    return made


def _free(c: Couplings, new: tuple[int, ...], varying: list[int]) -> int:
    """The part of a split dimension whose indices can be removed: the heads if the module names them, else the last."""
    heads, widths = _heads(c), _heads(c, dim=True)
    # beside the heads stands the width of one; queries, keys and values may be as many as the heads
    named = [dim for dim in varying if new[dim] in heads and (not widths or widths & {*new[:dim], *new[dim + 1 :]})]
    if not heads:  # another module may have cut it into heads
        named = [dim for dim, last in pairwise(varying) if (new[dim], new[last]) in c.head_cuts]
    # [3, heads, head_dim] may have equal sizes: the heads stand last but one
    return varying[-1] if not named else varying[-2] if varying[-2] in named else named[-1]


def _heads(c: Couplings, dim: bool = False) -> set[int]:
    """The numbers of heads that the running module states, or the widths of a head."""
    stated = vars(c.net.get_submodule(c.stack.name)).items()
    return {value for key, value in stated if "head" in key and ("dim" in key) is dim and type(value) is int}
