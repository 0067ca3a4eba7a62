"""A net's first layer as one operation, for training on a CPU: convolution, batch norm, ReLU and max pooling of images.

Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1 and the gradients of sec. 3). Ours: the convolution's map is never
written. It is the largest of a net, made of few numbers, and its statistics and gradients follow from theirs. Let ``p``
be the ``k = 9 in_channels`` pixels under a window (its taps), of which there are ``R``, with mean ``m`` and covariance
``S``, and ``w`` a channel's weight. Then ``x = w.p`` has the

    mean      w.m                  and      variance  v = w.S w,

exactly. With ``i = 1 / sqrt(v + eps)`` and ``x' = i w.(p - m)``, a channel's output is the maximum over a window of
``max(0, gamma x' + beta)``. Let ``g`` be the output's gradient at the pixel that won its window with a value above 0,
and 0 at the others, and ``G = sum g (p - m)``, which needs the winners alone. Then

    dbeta   = sum g
    dgamma  = sum g x' = i w.G
    dx      = gamma i (g - dbeta / R - x' dgamma / R)
    dweight = sum dx p = sum dx (p - m) = gamma i (G - dgamma i S w),

as ``dx`` sums up to 0, ``p - m`` does too, and ``sum x' (p - m) = i R S w``. Images get no gradient, and there is no
second derivative: switch the kernels off for one (``PROJECT_KERNELS=0``).
"""

import ctypes
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from project.kernels.batch_norm import is_training_norm_relu
from project.kernels.build import library
from project.kernels.maps import as_rows, is_plain, is_watched
from project.kernels.max_pool import halved_sides

MAX_IN_CHANNELS = 3
"""The covariance of the taps costs the square of their number."""


def first_layer(
    images: Tensor, conv: nn.Module, norm: nn.Module, activation: nn.Module, pool: nn.Module | None
) -> Tensor | None:
    """``pool(activation(norm(conv(images))))`` of float32 images ``[N, C, H, W]``, the running statistics updated.

    ``None`` where that is not a plain 3x3 convolution of at most 3 channels that need no gradient, to a multiple of 8,
    with stride and padding 1 and no bias, then batch norm in training, ReLU, and max pooling 2x2 or nothing; or where
    there is no kernel (see :func:`project.kernels.maps.is_plain`).

    Errors relative to float64, in norms: 1e-7 of the output, 4e-7 of the gradients; 2e-4 where two pixels of a window
    are so near that rounding swaps them, in torch's float32 too. Under autocast the output has its type, but images,
    weights and sums are not rounded to it: 2e-3 and 4e-7, torch's 2e-3 and 1e-2 to 9e-2.
    """
    if images.requires_grad or not _is_first(conv, images):
        return None
    sides = list(images.shape[2:]) if pool is None else halved_sides(images, pool)
    if not is_training_norm_relu(norm, activation) or norm.weight.dtype != torch.float32 or not is_plain(images):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if images.numel() == images.shape[1]:  # of one value per channel torch makes an error
        return None
    if sides is None or library(dtype) is None:
        return None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return _FirstLayer.apply(images, conv.weight, norm.weight, norm.bias, norm, 1 if pool is None else 2, sides, dtype)


def _is_first(conv: nn.Module, images: Tensor) -> TypeGuard[nn.Conv2d]:
    return (
        type(conv) is nn.Conv2d
        and images.dim() == 4
        and images.shape[1] == conv.in_channels <= MAX_IN_CHANNELS
        and conv.out_channels % 8 == 0
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and conv.weight.dtype == images.dtype == torch.float32
        and not is_watched(conv)
    )


class _FirstLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        norm: nn.BatchNorm2d,
        window: int,
        sides: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        (num_images, in_channels, height, width), channels = images.shape, len(weight)
        y = torch.empty((num_images, channels, *sides), dtype=dtype, memory_format=torch.channels_last)
        place = torch.empty_like(y)  # integers of that size: which pixel of a window won
        padded = images.new_empty(num_images, in_channels, height + height % 2 + 2, width + width % 2 + 2)
        taps = 9 * in_channels
        moments = images.new_empty(taps * (1 + taps), dtype=torch.float64)
        inverse = gamma.new_empty(channels)
        weight = weight.contiguous()
        ctx.dtype, ctx.geometry = dtype, (*images.shape, channels, *sides, window)
        kernels = library(dtype)
        assert kernels is not None and norm.running_mean is not None and norm.running_var is not None
        done = kernels.first_layer(
            images.data_ptr(),
            *ctx.geometry,
            (ctypes.c_int64 * 4)(*images.stride()),
            weight.data_ptr(),
            gamma.data_ptr(),
            beta.data_ptr(),
            norm.eps,
            norm.momentum,
            norm.running_mean.data_ptr(),
            norm.running_var.data_ptr(),
            padded.data_ptr(),
            moments.data_ptr(),
            inverse.data_ptr(),
            y.data_ptr(),
            place.data_ptr(),
        )
        if not done:
            raise MemoryError("no memory for the sums of a first layer")
        ctx.save_for_backward(weight, gamma, padded, moments, inverse, place)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gamma, padded, moments, inverse, place = ctx.saved_tensors
        grad, stride = as_rows(grad.to(ctx.dtype))
        dweight, dgamma, dbeta = torch.empty_like(weight), torch.empty_like(gamma), torch.empty_like(gamma)
        kernels = library(ctx.dtype)
        assert kernels is not None
        done = kernels.first_layer_grad(
            padded.data_ptr(),
            *ctx.geometry,
            grad.data_ptr(),
            stride,
            place.data_ptr(),
            weight.data_ptr(),
            gamma.data_ptr(),
            moments.data_ptr(),
            inverse.data_ptr(),
            dweight.data_ptr(),
            dgamma.data_ptr(),
            dbeta.data_ptr(),
        )
        if not done:
            raise MemoryError("no memory for the sums of a first layer's gradient")
        return None, dweight, dgamma, dbeta, None, None, None, None
