"""A processor without VNNI, simulated: quantized ONNX files whose sums of products saturate.

``vpmaddubsw``, the x86 instruction before VNNI, multiplies unsigned bytes by signed ones and adds two products in 16
bits: what lies beyond [-32768, 32767] becomes the nearer end. Here :class:`onnx.reference.ReferenceEvaluator` runs the
file, and convolutions and matrix products of two dequantized tensors are computed with that instruction. Pairs are
neighbours in the order in which ONNX Runtime lays weights out: kernel rows, kernel columns, input channels.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional

Array = NDArray[Any]


class Dequantized(np.ndarray):
    """Floats that remember the integers, the scale and the zero point that they come from."""

    integers: Array
    scale: Array
    zero_point: Array


class DequantizeLinear(OpRun):
    def _run(self, x: Array, scale: Array, zero_point: Array | None = None, axis: int = 1, **_: Any) -> tuple[Array]:
        zero_point = np.zeros_like(scale, x.dtype) if zero_point is None else zero_point
        shape = [-1 if scale.ndim and dim == axis % x.ndim else 1 for dim in range(x.ndim)] if scale.ndim else []
        shifted = x.astype(np.int32) - zero_point.astype(np.int32).reshape(shape)
        result = (shifted * scale.reshape(shape)).astype(np.float32).view(Dequantized)
        result.integers, result.scale, result.zero_point = x, scale, zero_point
        return (result,)


def are_bytes(x: Array, w: Array) -> bool:
    """Whether integer kernels take this product: unsigned bytes times signed ones."""
    pair = (getattr(x, "integers", x), getattr(w, "integers", w))
    return [array.dtype for array in pair] == [np.uint8, np.int8]


def saturating_product(a: Array, b: Array) -> Array:
    """``a`` uint8 ``[M, K]`` times ``b`` int8 ``[K, N]``, two products at a time added in 16 bits: ``[M, N]`` int64."""
    odd = a.shape[1] % 2
    a, b = np.pad(a, ((0, 0), (0, odd))).astype(np.int32), np.pad(b, ((0, odd), (0, 0))).astype(np.int32)
    total = np.zeros((a.shape[0], b.shape[1]), np.int64)
    for k in range(0, a.shape[1], 2):
        total += np.clip(a[:, k, None] * b[k] + a[:, k + 1, None] * b[k + 1], -(2**15), 2**15 - 1)
    return total


def product(x: Dequantized, w: Array, scales: Array, zero_point: int) -> Array:
    """Integers ``[M, K]`` times integers ``[K, N]`` as the numbers that they stand for: ``[M, N]`` float."""
    total = saturating_product(x.integers.reshape(-1, w.shape[0]), w) - zero_point * w.sum(0, dtype=np.int64)
    return (total * (float(x.scale) * scales.astype(np.float64))).astype(np.float32)


class MatMul(OpRun):
    def _run(self, a: Any, b: Any) -> tuple[Array]:
        if not are_bytes(a, b):
            return (np.asarray(a) @ np.asarray(b),)
        y = product(a, b.integers, b.scale, int(a.zero_point))
        return (y.reshape(*a.shape[:-1], -1),)


class Gemm(OpRun):
    def _run(self, a: Any, b: Any, c: Array | None = None, transB: int = 0, **_: Any) -> tuple[Array]:  # noqa: N803
        if are_bytes(a, b):
            y = product(a, b.integers.T if transB else b.integers, b.scale, int(a.zero_point))
        else:
            y = np.asarray(a) @ np.asarray(b.T if transB else b)
        return (y if c is None else y + c,)


class Conv(OpRun):
    def _run(self, x: Any, w: Any, b: Array | None = None, **attributes: Any) -> tuple[Array]:
        rank = x.ndim - 2
        strides, dilations = (list(attributes[name] or [1] * rank) for name in ("strides", "dilations"))
        pads, groups = list(attributes["pads"] or [0] * 2 * rank), attributes["group"] or 1
        if not are_bytes(x, w) or rank == 1 or w.shape[1] == 1:  # a filter for each channel has kernels of its own
            tensors = [torch.from_numpy(np.array(array)) for array in (x, w, *([] if b is None else [b]))]
            assert pads[:rank] == pads[rank:]
            convolve = functional.conv1d if rank == 1 else functional.conv2d
            y = convolve(*tensors[:2], *(tensors[2:] or [None]), strides, pads[:rank], dilations, groups)
            return (y.numpy(),)
        zero = int(x.zero_point)
        top, left, bottom, right = pads
        padded = np.pad(x.integers, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero)
        span = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, w.shape[2:], strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(2, 3))  # type: ignore[call-overload]
        windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
        parts = []
        for group in range(groups):
            inputs, outputs = w.shape[1], w.shape[0] // groups
            columns = windows[:, group * inputs : (group + 1) * inputs].transpose(0, 2, 3, 4, 5, 1)
            rows = w.integers[group * outputs : (group + 1) * outputs].transpose(2, 3, 1, 0).reshape(-1, outputs)
            scales = w.scale[group * outputs : (group + 1) * outputs]
            patches = np.ascontiguousarray(columns).view(Dequantized)
            patches.integers, patches.scale = np.ascontiguousarray(columns), x.scale
            parts.append(product(patches, rows, scales, zero).reshape(*columns.shape[:3], outputs))
        y = np.concatenate(parts, axis=-1).transpose(0, 3, 1, 2)
        return (y if b is None else y + b.reshape(-1, 1, 1),)


OPERATIONS: list[type[OpRun]] = [DequantizeLinear, MatMul, Gemm, Conv]


def run_saturating(model: ModelProto, images: Array) -> Array:
    """The model's output on a processor without VNNI."""
    return ReferenceEvaluator(model, new_ops=OPERATIONS).run(None, {"images": images})[0]  # type: ignore[arg-type]


def run_exactly(model: ModelProto, images: Array) -> Array:
    """The model's output in exact arithmetic: products of integers, their sums, and their scales."""
    return ReferenceEvaluator(model).run(None, {"images": images})[0]
