"""One rule for each kind of operation: which channels of its inputs and outputs go together.

The operations are those of ATen, to which every layer and function of PyTorch comes down. A fork adds its own operation
by a decorator, or lets an operation that treats each channel on its own share a rule::

    from project.compression.thinning.operations import RULES, elementwise

    RULES["my_activation"] = elementwise

A rule is called with the :class:`~project.compression.thinning.couplings.Couplings`, the result, and the arguments of
the operation. It returns the label of the result, or a list of labels for several results. A dimension that a rule
leaves out of the label is not followed any more: its slots must be fixed first. An operation without a rule fixes the
channels that pass through it.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

from project.compression.thinning.couplings import OF_A_HEAD, Axis, Couplings, Label, Rule, Slots, Split, View, flat

RULES: dict[str, Rule] = {}
"""The rule of each operation, by the operation's name in its library. A name ending in ``_`` uses the rule without."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator that gives operations a rule.

    Args:
        names: names of operations, such as ``"convolution"``.
    """

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


# -- each channel on its own -----------------------------------------------------------------------------------------


@rule(
    *("relu", "hardswish", "gelu", "silu", "mish", "sigmoid", "tanh", "leaky_relu", "elu", "celu", "selu", "hardtanh"),
    *("hardsigmoid", "clamp", "clamp_min", "clamp_max", "add", "sub", "rsub", "mul", "div", "pow", "exp", "sqrt"),
    *("rsqrt", "neg", "abs", "where", "softplus", "log_sigmoid_forward", "square", "erf", "log", "log1p", "expm1"),
    *("reciprocal", "maximum", "minimum", "clone", "_to_copy", "detach", "alias", "lift_fresh", "native_dropout"),
    *("_prelu_kernel", "hardshrink", "softshrink", "threshold", "addcmul", "addcdiv", "lerp", "copy", "masked_fill"),
    *("bernoulli", "eq", "ne", "lt", "gt", "le", "ge", "logical_not", "logical_and", "empty_like", "zeros_like"),
    *("ones_like", "sign", "sin", "cos", "atan", "floor", "ceil", "round", "nan_to_num", "_conj", "contiguous"),
    *("fill", "bitwise_and", "bitwise_not", "bitwise_or", "isnan", "isinf", "rand_like", "randn_like", "full_like"),
)
def elementwise(c: Couplings, result: Any, *args: Any, **kwargs: Any) -> Label:
    """Every output channel depends on the input channels at its position alone."""
    out = next(each for each in flat(result) if isinstance(each, Tensor))
    tensors = [each for each in flat((args, kwargs)) if isinstance(each, Tensor) and each.dim()]
    label: list[Axis] = []
    for dim in range(out.dim()):
        back, size = dim - out.dim(), out.shape[dim]
        axes: list[Axis] = []
        for tensor in tensors:
            if -back > tensor.dim():
                continue
            axis = c.of(tensor)[back]
            if tensor.shape[back] != size:
                c.joined.fix(axis, "it is one channel that is spread over others")
            else:
                axes.append(axis)
        label.append(_same(c, axes) if size > 1 else next((axis for axis in axes if axis is not None), None))
    return tuple(label)


def _same(c: Couplings, axes: Sequence[Axis]) -> Axis:
    """The one axis that several axes are. Channels that meet a tensor which is not followed stay."""
    known = [axis for axis in axes if axis is not None]
    for axis in known[1:]:
        c.joined.join(known[0], axis)
    if known and len(known) < len(axes):
        c.joined.fix(known[0], f"it meets a tensor in {c.stack.name or 'the net'} that is not sliced with it")
        return None
    return known[0] if known else None


@rule(
    *("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa"),
    *("_upsample_bicubic2d_aa", "reflection_pad2d", "replication_pad2d"),
)
def over_pixels(c: Couplings, result: Any, x: Tensor, *_: Any, **__: Any) -> Label:
    """Poolings and interpolations over the last two dimensions."""
    return _over_last(c, x, 2)


@rule("max_pool3d_with_indices", "avg_pool3d", "_adaptive_avg_pool3d", "upsample_nearest3d", "upsample_trilinear3d")
def over_voxels(c: Couplings, result: Any, x: Tensor, *_: Any, **__: Any) -> Label:
    """Poolings and interpolations over the last three dimensions."""
    return _over_last(c, x, 3)


@rule("avg_pool1d", "upsample_nearest1d", "upsample_linear1d", "reflection_pad1d", "replication_pad1d")
def over_points(c: Couplings, result: Any, x: Tensor, *_: Any, **__: Any) -> Label:
    """Poolings and interpolations over the last dimension."""
    return _over_last(c, x, 1)


def _over_last(c: Couplings, x: Tensor, num_dims: int) -> Label:
    label = c.of(x)
    for axis in label[-num_dims:]:
        c.stay(axis, "a pooling")
    return (*label[:-num_dims], *((None,) * num_dims))


@rule("empty", "zeros", "ones", "full", "arange", "scalar_tensor", "new_zeros", "new_ones", "new_full", "linspace",
      "rand", "randn", "new_empty", "eye")  # fmt: skip
def constant(c: Couplings, result: Tensor, *_: Any, **__: Any) -> None:
    """Tensors that do not depend on channels."""


# -- convolutions and matrix products --------------------------------------------------------------------------------


@rule("convolution", "_convolution")
def convolution(c: Couplings, result: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *args: Any, **_: Any) -> Label:
    """A convolution of 1, 2 or 3 dimensions, transposed or not, grouped or not."""
    transposed, groups = bool(args[3]), int(args[5])
    seen, weight = c.of(x)[1], c.of(w)
    read, made = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    pixels = result if not transposed else x
    constant = w.numel() * pixels[0, 0].numel() * len(x)
    for axis in (read, made):
        constant //= 1 if axis is None else len(axis)
    c.multiply(constant, read, made)
    if groups > 1:
        made = _grouped(c, x.shape[1], result.shape[1], groups, seen, read, made, transposed, c.names.get(id(w), ""))
    else:
        c.joined.join(
            seen, read, "it reads the images" if seen is None else "a convolution with another weight reads it"
        )
    if b is not None:
        c.joined.join(made, c.of(b)[0])
    return (c.of(x)[0], made, *(None,) * (result.dim() - 2))


def _grouped(
    c: Couplings,
    num_in: int,
    num_out: int,
    groups: int,
    seen: Axis,
    read: Axis,
    made: Axis,
    transposed: bool,
    name: str,
) -> Axis:
    """Couple a grouped convolution; the axis of its outputs."""
    if transposed:  # weight [in, out / groups, ...]
        c.joined.join(seen, read)
        for axis in (read, made):
            c.joined.fix(axis, "it belongs to a grouped transposed convolution")
        return None if made is None else np.tile(made, groups)
    if seen is None or made is None:
        c.joined.fix(seen, "a grouped convolution with a computed weight reads it")
        c.joined.fix(made, "it belongs to a grouped convolution that reads the images")
        return made
    if num_in == groups:  # depthwise
        c.joined.join(np.repeat(seen, num_out // groups), made)
        c.groups[name.rpartition(".")[0]] = seen
        return made
    c.joined.join(equal_shares(c, seen, groups), read)
    if num_out > groups:
        equal_shares(c, made, groups)
    else:
        c.joined.fix(made, "each group of a convolution has one of them")
    return made


def equal_shares(c: Couplings, slots: Slots, groups: int) -> Slots:
    """Let each of several groups lose the channels at the same places; the slots of the first group."""
    grid = slots.reshape(groups, -1)
    for row in grid[1:]:
        c.joined.join(grid[0], row)
    return grid[0]


@rule("mm")
def mm(c: Couplings, result: Tensor, a: Tensor, b: Tensor) -> Label:
    """A matrix product ``[rows, inner] [inner, columns]``, as of a linear layer."""
    (rows, inner), (inner2, columns) = c.of(a), c.of(b)
    _product(c, a.numel() * b.shape[1], inner, inner2, columns, rows)
    return rows, columns


@rule("addmm")
def addmm(c: Couplings, result: Tensor, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Label:
    """A matrix product with a bias."""
    return _add_bias(c, mm(c, result, a, b), bias)


@rule("bmm")
def bmm(c: Couplings, result: Tensor, a: Tensor, b: Tensor) -> Label:
    """A batch of matrix products, as in attention."""
    (batch, rows, inner), (batch2, inner2, columns) = c.of(a), c.of(b)
    if _in_attention(c):
        c.joined.fix(inner, OF_A_HEAD)
    if batch is not None or batch2 is not None:
        c.joined.join(batch, batch2)
    _product(c, a.numel() * b.shape[2], inner, inner2, columns, rows, batch)
    return batch, rows, columns


@rule("baddbmm")
def baddbmm(c: Couplings, result: Tensor, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Label:
    """A batch of matrix products with a bias."""
    return _add_bias(c, bmm(c, result, a, b), bias)


@rule("mv")
def mv(c: Couplings, result: Tensor, a: Tensor, b: Tensor) -> Label:
    """A matrix times a vector."""
    (rows, inner), (inner2,) = c.of(a), c.of(b)
    _product(c, a.numel(), inner, inner2, None, rows)
    return (rows,)


def _product(c: Couplings, macs: int, inner: Axis, inner2: Axis, columns: Axis, *others: Axis) -> None:
    if inner is not None or inner2 is not None:
        c.joined.join(inner, inner2, "it is summed with numbers that are not followed")
    read = inner2 if inner2 is not None else inner
    constant = float(macs)
    for axis in (read, columns, *others):
        constant /= 1 if axis is None else len(axis)
    c.multiply(constant, read, columns, *others)


def _add_bias(c: Couplings, label: Label, bias: Tensor) -> Label:
    for axis, own, size in zip(label[::-1], c.of(bias)[::-1], bias.shape[::-1], strict=False):
        if size > 1 and (axis is not None or own is not None):
            c.joined.join(axis, own)
    return label


# -- norms and reductions --------------------------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
      "_batch_norm_with_update", "cudnn_batch_norm")  # fmt: skip
def batch_norm(c: Couplings, result: Any, x: Tensor, *args: Any, **_: Any) -> Label:
    """Statistics over all dimensions but the second. Over channels they are taken if a weight is standardised."""
    label = c.of(x)
    c.mix({dim: axis for dim, axis in enumerate(label) if dim != 1})
    for tensor in args[:4]:
        if isinstance(tensor, Tensor):
            c.joined.join(label[1], c.of(tensor)[0], "its norm normalises what is not followed")
    return label


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(c: Couplings, result: Any, x: Tensor, shape: Sequence[int], *args: Any, **kwargs: Any) -> Label:
    """Statistics over the last dimensions."""
    label, first = c.of(x), x.dim() - len(shape)
    c.mix({dim: label[dim] for dim in range(first, x.dim())})
    for tensor in (*args, *kwargs.values()):
        for axis, own in zip(label[first:], c.of(tensor), strict=True) if isinstance(tensor, Tensor) else ():
            c.joined.join(axis, own, "its norm normalises what is not followed")
    return label


@rule("native_group_norm")
def group_norm(
    c: Couplings, result: Any, x: Tensor, w: Any, b: Any, n: int, channels: int, hw: int, groups: int, *_: Any
) -> Label:
    """Statistics over the pixels and channels of each group. Each group loses an equal share of its channels."""
    label = c.of(x)
    c.mix({1: label[1]})
    for tensor in (w, b):
        if isinstance(tensor, Tensor):
            c.joined.join(label[1], c.of(tensor)[0], "its norm normalises what is not followed")
    if label[1] is not None and channels > groups:
        equal_shares(c, label[1], groups)
    elif label[1] is not None:
        c.single_groups[c.stack.name] = label[1]
    return label


@rule("mean", "sum", "amax", "amin", "var", "std", "prod", "var_mean", "linalg_vector_norm", "norm", "argmax", "cumsum",
      "max", "min", "std_mean", "logsumexp", "all", "any", "topk", "sort")  # fmt: skip
def reduction(c: Couplings, result: Any, x: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
    """A number over some dimensions. The masked net computes it over the channels that are kept, as for a norm."""
    label = c.of(x)
    given = next((each for each in args if isinstance(each, list | tuple)), kwargs.get("dim"))
    if given is None:
        given = [each for each in args if type(each) is int][:1] or range(x.dim())
    dims = (
        {dim % x.dim() for dim in ([given] if isinstance(given, int) else given or range(x.dim()))}
        if x.dim()
        else set()
    )
    outs = [each for each in flat(result) if isinstance(each, Tensor)]
    c.mix({dim: label[dim] for dim in dims}, outs)
    if outs[0].dim() == x.dim():
        made = tuple(None if dim in dims else axis for dim, axis in enumerate(label))
    else:
        made = tuple(axis for dim, axis in enumerate(label) if dim not in dims)
    return [made] * len(outs)


@rule("_softmax", "_log_softmax", "_safe_softmax")
def softmax(c: Couplings, result: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> Label:
    """Channels over which a softmax is taken stay."""
    label = c.of(x)
    c.stay(label[dim], "a softmax")
    return label


# -- changes of shape ------------------------------------------------------------------------------------------------


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
            label.append(_same(c, axes))
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
    """A tensor is cut into parts. Equal parts lose the same channels. Others need a module that states their sizes."""
    label = c.of(x)
    axis = label[dim]
    if axis is None:
        return [label] * len(result)
    parts = np.split(axis, np.cumsum([each.shape[dim] for each in result])[:-1])
    lengths = [len(part) for part in parts]
    module = c.net.get_submodule(c.stack.name)
    stated = [*vars(module).values()]
    if isinstance(module, nn.MultiheadAttention):  # its parts are one third and two thirds
        equal_shares(c, axis, 3)
    elif len({*lengths}) > 1 and any(isinstance(each, list | tuple) and [*each] == lengths for each in stated):
        c.splits.append(Split(c.stack.name, tuple(parts)))
    elif len({*lengths}) == 1 or all(any(type(each) is int and each == size for each in stated) for size in lengths):
        first: dict[int, Slots] = {}
        for part in parts:
            c.joined.join(first.setdefault(len(part), part), part)
        c.splits.append(Split(c.stack.name, tuple(parts)))
    else:
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
    if axis is not None and result.shape[dim] != x.shape[dim]:
        c.joined.fix(axis, f"{c.stack.name or 'the net'} takes a part of them by numbers")
        label[dim] = axis[slice(start, end, step)]
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
    if single and not _in_attention(c):
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


def _in_attention(c: Couplings) -> bool:
    """Whether torch's layer of attention is running."""
    return isinstance(c.net.get_submodule(c.stack.name), nn.MultiheadAttention)


def _heads(c: Couplings, dim: bool = False) -> set[int]:
    """The numbers of heads that the running module states, or the widths of a head."""
    stated = vars(c.net.get_submodule(c.stack.name)).items()
    return {value for key, value in stated if "head" in key and ("dim" in key) is dim and type(value) is int}
