"""One rule for each operation that computes: elementwise, pooling, products, norms and reductions.

The operations are those of ATen, to which every layer and function of PyTorch comes down. Changes of shape have rules
in :mod:`project.compression.thinning.shapes`. A fork adds its own operation by a decorator, or lets an operation that
treats each channel on its own share a rule::

    from project.compression.thinning.operations import elementwise
    from project.compression.thinning.rules import RULES

    RULES["my_activation"] = elementwise
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from project.compression.thinning.calls import flat
from project.compression.thinning.couplings import OF_A_HEAD, Couplings
from project.compression.thinning.rules import equal_shares, in_attention, rule, same
from project.compression.thinning.slots import Axis, Label

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
        label.append(same(c, axes) if size > 1 else next((axis for axis in axes if axis is not None), None))
    return tuple(label)


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
    if in_attention(c):
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
    _mix(c, x, {0, *range(2, x.dim())})
    for tensor in args[:4]:
        if isinstance(tensor, Tensor):
            c.joined.join(label[1], c.of(tensor)[0], "its norm normalises what is not followed")
    return label


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(c: Couplings, result: Any, x: Tensor, shape: Sequence[int], *args: Any, **kwargs: Any) -> Label:
    """Statistics over the last dimensions."""
    label, first = c.of(x), x.dim() - len(shape)
    _mix(c, x, range(first, x.dim()))
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
    c.mix({1: label[1]}, math.inf if channels == groups else hw / groups)
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
    _mix(c, x, dims, outs)
    if outs[0].dim() == x.dim():
        made = tuple(None if dim in dims else axis for dim, axis in enumerate(label))
    else:
        made = tuple(axis for dim, axis in enumerate(label) if dim not in dims)
    return [made] * len(outs)


def _mix(c: Couplings, x: Tensor, dims: Iterable[int], results: Iterable[Tensor] = ()) -> None:
    axes = {dim: c.of(x)[dim] for dim in dims}
    c.mix(axes, math.prod(x.shape[dim] for dim, axis in axes.items() if axis is None), results)


@rule("_softmax", "_log_softmax", "_safe_softmax")
def softmax(c: Couplings, result: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> Label:
    """Channels over which a softmax is taken stay."""
    label = c.of(x)
    c.stay(label[dim], "a softmax")
    return label
