"""Max pooling that remembers a window's winner in as many bytes as a value has, for training on a CPU.

Torch keeps its position in eight bytes, four times a bfloat16 value. Forward takes the first of equal values and lets
NaN win, as torch does; backward lets each pixel collect from the windows that chose it, in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.pooling import _MaxPoolNd

from project.kernels.build import library
from project.kernels.maps import can_run, is_watched


def max_pool(x: Tensor, pool: _MaxPoolNd) -> Tensor | None:
    """``pool(x)`` of a map ``[N, C, H, W]``; ``None`` where there is no kernel for it: see
    :func:`project.kernels.maps.can_run`; windows are squares of up to 15 pixels a side, without dilation.
    """
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    if not isinstance(kernel, int) or not isinstance(stride, int) or not isinstance(padding, int):
        return None
    if pool.dilation != 1 or pool.return_indices or not 0 < kernel <= 15 or not can_run(x):
        return None
    sides = [_side(side, kernel, stride, padding, pool.ceil_mode) for side in x.shape[2:]]
    if min(sides) < 1 or 2 * padding > kernel:
        return None
    return _MaxPool.apply(x, sides, kernel, stride, padding)


def halved_sides(x: Tensor, pool: nn.Module) -> list[int] | None:
    """The sides of ``pool(x)``; ``None`` where that is not max pooling 2x2 without hooks, or nothing is left."""
    if not isinstance(pool, nn.MaxPool2d) or pool.return_indices or is_watched(pool):
        return None
    if (pool.kernel_size, pool.stride, pool.padding, pool.dilation) != (2, 2, 0, 1):
        return None
    sides = [(side + 1) // 2 if pool.ceil_mode else side // 2 for side in x.shape[2:]]
    return sides if min(sides) > 0 else None


def _side(side: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Torch's rule: with ``ceil_mode`` a last window that begins in the right padding is left out."""
    out = (side + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= side + padding else out


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sides: list[int], kernel: int, stride: int, padding: int) -> Tensor:
        images, channels, height, width = x.shape
        y = torch.empty((images, channels, *sides), dtype=x.dtype, memory_format=torch.channels_last)
        place = torch.empty_like(y)  # integers of that size
        ctx.geometry = (images, height, width, channels, *sides, kernel, stride, padding)
        kernels = library(x.dtype)
        assert kernels is not None
        kernels.max_pool(x.data_ptr(), *ctx.geometry, y.data_ptr(), place.data_ptr())
        ctx.save_for_backward(place)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        images, height, width, channels = ctx.geometry[:4]
        grad = grad.to(ctx.dtype).contiguous(memory_format=torch.channels_last)
        dx = torch.empty((images, channels, height, width), dtype=ctx.dtype, memory_format=torch.channels_last)
        kernels = library(ctx.dtype)
        assert kernels is not None
        kernels.max_pool_grad(grad.data_ptr(), place.data_ptr(), *ctx.geometry, dx.data_ptr())
        return dx, None, None, None, None
