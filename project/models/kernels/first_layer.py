"""A net's first layer as one operation, for training on a CPU: convolution, batch norm, ReLU and max pooling of images.

Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1 and the gradients of sec. 3). Our addition: the output ``x`` of the
convolution is never written to memory. It is the largest map of a net, but it is computed of few numbers, the images.
So its statistics and gradients can be computed from statistics of the images.

The convolution has ``R`` output pixels. Under each lie ``k = 9 in_channels`` numbers of the image, its taps ``p``. Let
``m`` be the mean and ``S`` the covariance of the taps over all output pixels, and ``w`` the weight of a channel. Then
``x = w.p`` has exactly the

    mean      w.m                  and the      variance  v = w.S w.

With ``i = 1 / sqrt(v + eps)`` and ``x' = i w.(p - m)``, a channel's output is the maximum of
``max(0, gamma x' + beta)`` over a window of the pooling. For the backward pass, let ``g`` be the output's gradient at
each pixel that won its window with a value above 0, and 0 at all other pixels. ``G = sum g (p - m)`` needs the winners
only. Then

    dbeta   = sum g
    dgamma  = sum g x' = i w.G
    dx      = gamma i (g - dbeta / R - x' dgamma / R)
    dweight = sum dx p = sum dx (p - m) = gamma i (G - dgamma i S w),

because the sum of ``dx`` is 0, the sum of ``p - m`` is 0, and ``sum x' (p - m) = i R S w``. Images get no gradient. If
a second derivative is wanted (``create_graph``), torch's operators compute the gradients.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from project.models.kernels.batch_norm import Norm, training_norm
from project.models.kernels.build import library, used
from project.models.kernels.known import is_known
from project.models.kernels.maps import address, as_rows, gradients_by_torch, is_plain, is_plain_gradient, pointer
from project.models.kernels.max_pool import PLACES, halved_sides

LAST = torch.channels_last
MAX_IN_CHANNELS = 3
"""Largest number of the images' channels: the cost of the taps' covariance grows with the square of this number."""


def first_layer(
    images: Tensor, conv: nn.Module, norm: nn.Module, activation: nn.Module, pool: nn.Module | None
) -> Tensor | None:
    """``pool(activation(norm(conv(images))))`` of float32 images ``[N, C, H, W]``. The running statistics are updated.

    The result is ``None``, and nothing is done, unless all of this holds:

    - ``conv`` is a plain 3x3 convolution with stride 1, padding 1 and no bias. It has at most 3 input channels, and a
      multiple of 8 output channels. The images need no gradient.
    - Batch norm in training, ReLU, and max pooling 2x2 or no pooling follow.
    - There is a kernel (see :func:`project.models.kernels.maps.is_plain` and
      :func:`project.models.kernels.known.is_known`).

    Relative errors against float64, in norms: 1e-7 of the output and 4e-7 of the gradients. The gradients' error is
    2e-4 if two pixels of a window are so close that rounding swaps their order; the same holds for torch's float32.
    Under autocast the output has autocast's type, but images, weights and sums are not rounded to it. The errors are
    then 2e-3 of the output and 4e-7 of the gradients; torch's are 2e-3, and 1e-2 to 9e-2.
    """
    if not is_plain(images) or images.requires_grad or not _is_first(conv, images):
        return None
    sides = list(images.shape[2:]) if pool is None else halved_sides(images, pool)
    weight = conv.weight
    own = None if sides is None else training_norm(norm, activation, len(weight))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if images.numel() == images.shape[1]:  # one value per channel: torch raises its own error
        return None
    if own is None or library(dtype) is None:
        return None
    own.num_batches_tracked.add_(1)
    used.add("first_layer")
    return _FirstLayer.apply(images, weight, own.weight, own.bias, own, 1 if pool is None else 2, sides, dtype)


def _is_first(conv: nn.Module, images: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether ``conv`` is a convolution of images that the kernel can compute (see :func:`first_layer`)."""
    channels = images.shape[1]
    return (
        is_known(conv, nn.Conv2d)
        and channels <= MAX_IN_CHANNELS
        and images.dtype is torch.float32
        and address(conv.weight, torch.float32, conv.weight.numel(), None) != 0
        and conv.weight.shape[1:] == (channels, 3, 3)
        and len(conv.weight) % 8 == 0
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
    )


def _by_torch(
    images: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float, window: int, sides: Sequence[int]
) -> Tensor:
    """The first layer by torch's operators."""
    x = functional.conv2d(images, weight, padding=1)
    y = functional.batch_norm(x, None, None, gamma, beta, training=True, eps=eps).relu()
    ceil_mode = list(sides) != [side // 2 for side in x.shape[2:]]
    return y if window == 1 else functional.max_pool2d(y, 2, ceil_mode=ceil_mode)


class _FirstLayer(torch.autograd.Function):
    """The first layer. ``window`` is 2 with pooling, else 1; ``sides`` are the output's height and width.

    For the gradient it keeps the padded copy of the images, mean and covariance of the taps, 1 / standard deviation of
    each channel, and the place of each window's winner.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        norm: Norm,
        window: int,
        sides: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        (num_images, in_channels, height, width), channels, single = images.shape, len(weight), torch.float32
        y = torch.empty((num_images, channels, *sides), dtype=dtype, device=images.device, memory_format=LAST)
        place = torch.empty_like(y, dtype=PLACES[dtype])
        # A border of one pixel around the image. Odd sides get one pixel more, so that all windows are whole.
        padded = images.new_empty(num_images, in_channels, height + height % 2 + 2, width + width % 2 + 2)
        taps = 9 * in_channels
        moments = images.new_empty(taps * (1 + taps), dtype=torch.float64)  # m [taps] and S [taps, taps]
        inverse = images.new_empty(channels)
        filters = weight.contiguous()
        ctx.dtype, ctx.eps, ctx.geometry = dtype, norm.arguments[2], (*images.shape, channels, *sides, window)
        kernels = library(dtype)
        assert kernels is not None
        done = kernels.first_layer(
            pointer(images, single, images.numel(), None),
            *ctx.geometry,
            (ctypes.c_int64 * 4)(*images.stride()),
            pointer(filters, single, channels * taps),
            *norm.arguments,
            pointer(padded, single, padded.numel()),
            pointer(moments, torch.float64, taps * (1 + taps)),
            pointer(inverse, single, channels),
            pointer(y, dtype, y.numel(), LAST),
            pointer(place, PLACES[dtype], y.numel(), LAST),
        )
        if not done:
            raise MemoryError("there is no memory for the sums of the first layer: choose a smaller batch_size")
        ctx.save_for_backward(images, weight, gamma, beta, padded, moments, inverse, place)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, gamma, beta, padded, moments, inverse, place = ctx.saved_tensors
        (num_images, in_channels, height, width, channels, *sides, window), single = ctx.geometry, torch.float32
        if not is_plain_gradient(grad):

            def layer(weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
                return _by_torch(images, weight, gamma, beta, ctx.eps, window, sides)

            return None, *gradients_by_torch(layer, (weight, gamma, beta), grad), None, None, None, None
        place = place.contiguous(memory_format=LAST)  # a hook on saved tensors may have changed its layout
        grad, stride = as_rows(grad.to(ctx.dtype))
        filters, taps = weight.contiguous(), 9 * in_channels
        dweight, dgamma, dbeta = torch.empty_like(filters), torch.empty_like(gamma), torch.empty_like(beta)
        lines, length = height + height % 2 + 2, width + width % 2 + 2
        kernels = library(ctx.dtype)
        assert kernels is not None
        done = kernels.first_layer_grad(
            pointer(padded, single, num_images * in_channels * lines * length),
            *ctx.geometry,
            pointer(grad, ctx.dtype, place.numel(), None),
            stride,
            pointer(place, PLACES[ctx.dtype], num_images * channels * sides[0] * sides[1], LAST),
            pointer(filters, single, channels * taps),
            pointer(gamma, single, channels),
            pointer(moments, torch.float64, taps * (1 + taps)),
            pointer(inverse, single, channels),
            pointer(dweight, single, channels * taps),
            pointer(dgamma, single, channels),
            pointer(dbeta, single, channels),
        )
        if not done:
            raise MemoryError("there is no memory for the gradient of the first layer: choose a smaller batch_size")
        return None, dweight, dgamma, dbeta, None, None, None, None
