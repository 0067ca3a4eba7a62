"""Max pooling that remembers a window's winner in as many bytes as a value has, for training on a CPU.

Torch keeps its position in eight bytes, four times a bfloat16 value. Forward takes the first of equal values and lets
NaN win, as torch does; backward lets each pixel collect from the windows that chose it, in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn

from project.models.kernels.build import library, used
from project.models.kernels.known import has_known_class, is_known
from project.models.kernels.maps import can_run, is_plain_gradient, pointer

LAST = torch.channels_last
PLACES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""By the type of a map: the type of the winners' numbers, of as many bytes."""


def max_pool(x: Tensor, pool: nn.Module) -> Tensor | None:
    """``pool(x)`` of a map ``[N, C, H, W]``; ``None`` where there is no kernel for it: see
    :func:`project.models.kernels.maps.can_run`; windows are squares of up to 15 pixels a side, without dilation. To be
    called by ``pool`` itself: the hooks of ``pool`` are its caller's.
    """
    if not can_run(x) or not has_known_class(pool, nn.MaxPool2d):
        return None
    kernel, stride, padding = pool.kernel_size, pool.stride, pool.padding
    if type(kernel) is not int or type(stride) is not int or type(padding) is not int:
        return None
    if (
        pool.dilation != 1
        or pool.return_indices
        or not 0 < kernel <= 15
        or stride < 1
        or not 0 <= 2 * padding <= kernel
    ):
        return None
    sides = [_side(side, kernel, stride, padding, pool.ceil_mode) for side in x.shape[2:]]
    if min(sides) <= 0:
        return None
    used.add("max_pool")
    return _MaxPool.apply(x, sides, kernel, stride, padding)


def halved_sides(x: Tensor, pool: nn.Module) -> list[int] | None:
    """The sides of ``pool(x)``; ``None`` where ``pool`` is not known as max pooling 2x2, or nothing is left."""
    if not is_known(pool, nn.MaxPool2d) or pool.return_indices:
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
        (images, channels, height, width), dtype = x.shape, x.dtype
        y = torch.empty((images, channels, *sides), dtype=dtype, device=x.device, memory_format=LAST)
        place = torch.empty_like(y, dtype=PLACES[dtype])
        ctx.geometry, ctx.dtype = (images, height, width, channels, *sides, kernel, stride, padding), dtype
        kernels = library(dtype)
        assert kernels is not None
        ends = pointer(y, dtype, y.numel(), LAST), pointer(place, PLACES[dtype], y.numel(), LAST)
        kernels.max_pool(pointer(x, dtype, x.numel(), LAST), *ctx.geometry, *ends)
        ctx.save_for_backward(place)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        if not is_plain_gradient(grad):
            return _spread(grad.to(ctx.dtype), place, ctx.geometry), None, None, None, None
        images, height, width, channels = ctx.geometry[:4]
        dtype, place = ctx.dtype, place.contiguous(memory_format=LAST)
        grad = grad.to(dtype).contiguous(memory_format=LAST)
        dx = torch.empty((images, channels, height, width), dtype=dtype, device=grad.device, memory_format=LAST)
        kernels = library(dtype)
        assert kernels is not None
        starts = pointer(grad, dtype, place.numel(), LAST), pointer(place, PLACES[dtype], place.numel(), LAST)
        kernels.max_pool_grad(*starts, *ctx.geometry, pointer(dx, dtype, dx.numel(), LAST))
        return dx, None, None, None, None


def _spread(grad: Tensor, place: Tensor, geometry: tuple[int, ...]) -> Tensor:
    """What ``max_pool_grad`` computes, by torch's operators, which can be differentiated again."""
    images, height, width, channels, out_height, out_width, kernel, stride, padding = geometry
    top = torch.arange(out_height, device=place.device)[:, None] * stride - padding
    left = torch.arange(out_width, device=place.device) * stride - padding
    pixel = (top + place // kernel) * width + left + place % kernel
    dx = grad.new_zeros(images, channels, height * width)
    rows = images, channels, out_height * out_width
    return dx.scatter_add(2, pixel.reshape(rows), grad.reshape(rows)).reshape(images, channels, height, width)
