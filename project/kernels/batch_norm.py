"""Batch norm followed by ReLU, and by max pooling 2x2 where that comes next, as one operation, for training on a CPU.

Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1 and the gradients of sec. 3). Torch's batch norm and ReLU read and write
a map a dozen times forward and backward, these eight times; the kernel for max pooling adds three, as one operation
they are six. One pixel is subtracted before squares are summed up (Chan et al. 1983, shifted data): float32 suffices.
There is no second derivative: switch the kernels off for one (``PROJECT_KERNELS=0``).

Pooled (ours): a channel's norm and ReLU keep the order of its pixels, or turn it round, so a window's winner is found
among the ``x``; and the sums of the gradient, which is 0 at all the others, need the winners alone.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from project.kernels.build import library
from project.kernels.maps import as_rows, can_run, is_watched
from project.kernels.max_pool import halved_sides


def batch_norm_relu(x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor | None:
    """``activation(norm(x))`` of a map ``[N, C, H, W]``, the running statistics updated; ``None`` where that is not
    batch norm in training and ReLU, or there is no kernel for the map (see :func:`project.kernels.maps.can_run`).

    The output differs from torch's by the rounding of its type; the sums' relative error is about 1e-6.
    """
    if not _can_norm(x, norm, activation):
        return None
    _count(norm)
    return _BatchNormReLU.apply(x, norm.weight, norm.bias, norm)


def batch_norm_relu_pool(x: Tensor, norm: nn.Module, activation: nn.Module, pool: nn.Module) -> Tensor | None:
    """``pool(activation(norm(x)))`` like :func:`batch_norm_relu`; ``None`` also where that is not max pooling 2x2.

    The first of a window's equal ``x`` wins. Where different ``x`` become equal by rounding torch takes the first and
    this the greatest, so the gradient of such a pixel may lie beside torch's.
    """
    sides = halved_sides(x, pool)
    if sides is None or not _can_norm(x, norm, activation):
        return None
    _count(norm)
    return _BatchNormReLUPool.apply(x, norm.weight, norm.bias, norm, sides)


def is_training_norm_relu(norm: nn.Module, activation: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether the two are batch norm in training, with parameters and running statistics, and ReLU; without hooks."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and isinstance(activation, nn.ReLU)
        and norm.training
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
        and norm.affine
        and not is_watched(norm)
        and not is_watched(activation)
    )


def _can_norm(x: Tensor, norm: nn.Module, activation: nn.Module) -> bool:
    """Torch refuses one value per channel, in its own words."""
    return is_training_norm_relu(norm, activation) and can_run(x) and x.numel() > x.shape[1]


def _count(norm: nn.Module) -> None:
    assert isinstance(norm.num_batches_tracked, Tensor)
    norm.num_batches_tracked.add_(1)


def _norm_arguments(weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, saved: Tensor) -> tuple[Any, ...]:
    assert norm.running_mean is not None and norm.running_var is not None
    running = norm.running_mean.data_ptr(), norm.running_var.data_ptr()
    return weight.data_ptr(), bias.data_ptr(), norm.eps, norm.momentum, *running, saved.data_ptr()


def _check(done: int) -> None:
    if not done:
        raise MemoryError("no memory for the sums of a batch norm")


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        channels = x.shape[1]
        y, saved = torch.empty_like(x), weight.new_empty(4, channels)
        kernels = library(x.dtype)
        assert kernels is not None
        arguments = _norm_arguments(weight, bias, norm, saved)
        _check(kernels.batch_norm_relu(x.data_ptr(), x.numel() // channels, channels, *arguments, y.data_ptr()))
        ctx.save_for_backward(x, saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, saved = ctx.saved_tensors
        channels = x.shape[1]
        grad, stride = as_rows(grad.to(x.dtype))
        dx, coefficients = torch.empty_like(x), saved.new_empty(2, channels)
        dweight, dbias = saved.new_empty(channels), saved.new_empty(channels)
        kernels = library(x.dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu_grad(
            x.data_ptr(),
            grad.data_ptr(),
            x.numel() // channels,
            channels,
            stride,
            saved.data_ptr(),
            coefficients.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr(),
            dbias.data_ptr(),
        )
        _check(done)
        return dx, dweight, dbias, None


class _BatchNormReLUPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, sides: list[int]) -> Tensor:
        images, channels, height, width = x.shape
        y = torch.empty((images, channels, *sides), dtype=x.dtype, memory_format=torch.channels_last)
        winner, place = torch.empty_like(y), torch.empty_like(y)  # place: integers of that size
        saved = weight.new_empty(4, channels)
        ctx.geometry = images, height, width, channels, *sides
        kernels = library(x.dtype)
        assert kernels is not None
        arguments = _norm_arguments(weight, bias, norm, saved)
        pointers = winner.data_ptr(), place.data_ptr(), y.data_ptr()
        _check(kernels.batch_norm_relu_pool(x.data_ptr(), *ctx.geometry, *arguments, *pointers))
        ctx.save_for_backward(x, winner, place, saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, winner, place, saved = ctx.saved_tensors
        channels = x.shape[1]
        grad, stride = as_rows(grad.to(x.dtype))
        dx, coefficients = torch.empty_like(x), saved.new_empty(2, channels)
        dweight, dbias = saved.new_empty(channels), saved.new_empty(channels)
        kernels = library(x.dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu_pool_grad(
            x.data_ptr(),
            winner.data_ptr(),
            place.data_ptr(),
            grad.data_ptr(),
            *ctx.geometry,
            stride,
            saved.data_ptr(),
            coefficients.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr(),
            dbias.data_ptr(),
        )
        _check(done)
        return dx, dweight, dbias, None, None
