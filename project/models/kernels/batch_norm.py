"""Batch norm and ReLU, and max pooling 2x2 if it follows, as one operation, for training on a CPU.

Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1 and the gradients of sec. 3). The time goes into reading and writing the
map. Torch's batch norm and ReLU do it a dozen times in forward and backward, this kernel eight times. A separate kernel
for max pooling adds three more; all three layers as one operation do it six times in total. One pixel is subtracted
before squares are summed up (Chan et al. 1983, shifted data), so float32 is precise enough. If a second derivative is
wanted (``create_graph``), torch's operators compute the gradients.

The pooling is our own addition. The norm and the ReLU of a channel keep the order of its pixels, or reverse it if the
scale is negative. So the winner of a window is found among the inputs ``x``. The gradient is 0 at all other pixels, so
its sums need the winners only.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from project.models.kernels.build import library, used
from project.models.kernels.known import is_known
from project.models.kernels.maps import address, as_rows, can_run, gradients_by_torch, is_plain_gradient, pointer
from project.models.kernels.max_pool import PLACES, halved_sides

LAST = torch.channels_last


class Norm(NamedTuple):
    """A batch norm as a kernel needs it: its parameters, and the arguments for C with checked addresses."""

    weight: Tensor
    bias: Tensor
    num_batches_tracked: Tensor
    arguments: tuple[int | float, ...]
    """Addresses of weight and bias, eps, momentum, addresses of running mean and running variance."""


def batch_norm_relu(x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor | None:
    """``activation(norm(x))`` of a map ``[N, C, H, W]``. The running statistics are updated.

    The result is ``None``, and nothing is done, if the layers are not batch norm in training and ReLU (see
    :func:`training_norm`), or if there is no kernel for the map (see :func:`project.models.kernels.maps.can_run`).

    The output differs from torch's by the rounding of its type. The relative error of the sums is about 1e-6.
    """
    own = _take(x, norm, activation)
    if own is None:
        return None
    own.num_batches_tracked.add_(1)
    used.add("batch_norm_relu")
    return _BatchNormReLU.apply(x, own.weight, own.bias, own)


def batch_norm_relu_pool(x: Tensor, norm: nn.Module, activation: nn.Module, pool: nn.Module) -> Tensor | None:
    """``pool(activation(norm(x)))``, like :func:`batch_norm_relu`; also ``None`` if ``pool`` is not max pooling 2x2.

    Of equal ``x`` in a window the first wins. If different ``x`` become equal by rounding in the norm, torch takes the
    first and this kernel the greatest. The gradient may then go to another pixel of the window than in torch.
    """
    own = _take(x, norm, activation)
    sides = None if own is None else halved_sides(x, pool)
    if own is None or sides is None:
        return None
    own.num_batches_tracked.add_(1)
    used.add("batch_norm_relu_pool")
    return _BatchNormReLUPool.apply(x, own.weight, own.bias, own, sides)


def training_norm(norm: nn.Module, activation: nn.Module, channels: int) -> Norm | None:
    """The batch norm as a kernel needs it; ``None`` if a kernel cannot replace the two layers.

    It can if the layers are known (see :func:`project.models.kernels.known.is_known`) as batch norm of ``channels``
    channels, in training, and ReLU. All parameters and running statistics must exist, in float32 and without gaps in
    memory.
    """
    if not (is_known(norm, nn.BatchNorm2d) and is_known(activation, nn.ReLU)):
        return None
    if not (norm.training and norm.track_running_stats and type(norm.momentum) is type(norm.eps) is float):
        return None
    parameters, buffers = norm._parameters, norm._buffers  # ten times as fast as to read attributes of the module
    weight, bias, batches = parameters.get("weight"), parameters.get("bias"), buffers.get("num_batches_tracked")
    tensors = weight, bias, buffers.get("running_mean"), buffers.get("running_var")
    places = [address(tensor, torch.float32, channels) for tensor in tensors]
    if weight is None or bias is None or batches is None or not all(places):
        return None
    return Norm(weight, bias, batches, (*places[:2], norm.eps, norm.momentum, *places[2:]))


def _take(x: Tensor, norm: nn.Module, activation: nn.Module) -> Norm | None:
    """:func:`training_norm` if there is a kernel for ``x``. A map of one value per channel is left to torch's error."""
    return training_norm(norm, activation, x.shape[1]) if can_run(x) and x.numel() > x.shape[1] else None


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm and ReLU by torch's operators."""
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps).relu()


def _check(done: int) -> None:
    """Raise an error if a kernel returned 0, which means that it could not allocate memory."""
    if not done:
        raise MemoryError("there is no memory for the sums of a batch norm: choose a smaller batch_size")


class _BatchNormReLU(torch.autograd.Function):
    """Batch norm and ReLU. For the gradient it keeps ``x`` and four numbers per channel (see ``fit_norm`` in C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Norm) -> Tensor:
        channels, numel, dtype = x.shape[1], x.numel(), x.dtype
        y, saved = torch.empty_like(x), x.new_empty(4, channels, dtype=torch.float32)
        kernels = library(dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu(
            pointer(x, dtype, numel, LAST),
            numel // channels,
            channels,
            *norm.arguments,
            pointer(saved, torch.float32, 4 * channels),
            pointer(y, dtype, numel, LAST),
        )
        _check(done)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.eps = norm.arguments[2]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        if not is_plain_gradient(grad):
            layer = partial(_by_torch, eps=ctx.eps)
            return *gradients_by_torch(layer, (x, weight, bias), grad), None
        x = x.contiguous(memory_format=LAST)  # a hook on saved tensors may have changed its layout
        channels, numel, dtype = x.shape[1], x.numel(), x.dtype
        grad, stride = as_rows(grad.to(dtype))  # a slice of a concatenated gradient needs no copy
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        kernels = library(dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu_grad(
            pointer(x, dtype, numel, LAST),
            pointer(grad, dtype, numel, None),
            numel // channels,
            channels,
            stride,
            pointer(saved, torch.float32, 4 * channels),
            pointer(dx, dtype, numel, LAST),
            pointer(dweight, torch.float32, channels),
            pointer(dbias, torch.float32, channels),
        )
        _check(done)
        return dx, dweight, dbias, None


class _BatchNormReLUPool(torch.autograd.Function):
    """Batch norm, ReLU and max pooling 2x2.

    For the gradient it keeps, beside what :class:`_BatchNormReLU` keeps, each window's winner: its value ``x`` and its
    place, 0 to 3, or 4 if the ReLU is closed (its output is 0).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Norm, sides: list[int]) -> Tensor:
        (images, channels, height, width), dtype = x.shape, x.dtype
        y = torch.empty((images, channels, *sides), dtype=dtype, device=x.device, memory_format=LAST)
        winner, place = torch.empty_like(y), torch.empty_like(y, dtype=PLACES[dtype])
        saved = x.new_empty(4, channels, dtype=torch.float32)
        ctx.geometry, ctx.eps = (images, height, width, channels, *sides), norm.arguments[2]
        kernels = library(dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu_pool(
            pointer(x, dtype, x.numel(), LAST),
            *ctx.geometry,
            *norm.arguments,
            pointer(saved, torch.float32, 4 * channels),
            pointer(winner, dtype, y.numel(), LAST),
            pointer(place, PLACES[dtype], y.numel(), LAST),
            pointer(y, dtype, y.numel(), LAST),
        )
        _check(done)
        ctx.save_for_backward(x, weight, bias, winner, place, saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, winner, place, saved = ctx.saved_tensors
        images, height, width, channels, *sides = ctx.geometry
        if not is_plain_gradient(grad):
            ceil_mode = sides != [height // 2, width // 2]

            def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return functional.max_pool2d(_by_torch(x, weight, bias, ctx.eps), 2, ceil_mode=ceil_mode)

            return *gradients_by_torch(layer, (x, weight, bias), grad), None, None
        x, winner, place = (part.contiguous(memory_format=LAST) for part in (x, winner, place))
        dtype, numel = x.dtype, winner.numel()
        grad, stride = as_rows(grad.to(dtype))
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        kernels = library(dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu_pool_grad(
            pointer(x, dtype, images * height * width * channels, LAST),
            pointer(winner, dtype, numel, LAST),
            pointer(place, PLACES[dtype], numel, LAST),
            pointer(grad, dtype, numel, None),
            *ctx.geometry,
            stride,
            pointer(saved, torch.float32, 4 * channels),
            pointer(dx, dtype, x.numel(), LAST),
            pointer(dweight, torch.float32, channels),
            pointer(dbias, torch.float32, channels),
        )
        _check(done)
        return dx, dweight, dbias, None, None
