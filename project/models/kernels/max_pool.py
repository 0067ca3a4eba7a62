"""Max pooling that stores the place of a window's winner in as many bytes as a value has, for training on a CPU.

Torch stores the place in eight bytes, four times as many as a bfloat16 value. The winner of a window is the pixel with
its maximum. In forward the first of equal values wins, and NaN wins over all numbers, as in torch. In backward each
pixel collects the gradients of the windows that it won, in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn

from project.models.kernels.build import library, used
from project.models.kernels.known import has_known_class, is_known
from project.models.kernels.maps import can_run, is_plain_gradient, pointer

LAST = torch.channels_last
PLACES = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""For each type of a map, the integer type of as many bytes, in which the places of the winners are stored."""


def max_pool(x: Tensor, pool: nn.Module) -> Tensor | None:
    """``pool(x)`` of a map ``[N, C, H, W]``; ``None`` if there is no kernel for it.

    There is one if :func:`project.models.kernels.maps.can_run` is true and the windows are squares of up to 15 pixels a
    side, without dilation. The ``forward`` of ``pool`` itself calls this function, so hooks of ``pool`` run as usual.
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
    """Height and width of ``pool(x)``; ``None`` if ``pool`` is not max pooling 2x2, or if the output is empty."""
    if not is_known(pool, nn.MaxPool2d) or pool.return_indices:
        return None
    if (pool.kernel_size, pool.stride, pool.padding, pool.dilation) != (2, 2, 0, 1):
        return None
    sides = [(side + 1) // 2 if pool.ceil_mode else side // 2 for side in x.shape[2:]]
    return sides if min(sides) > 0 else None


def _side(side: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """A side of the output. As in torch, ``ceil_mode`` leaves out a last window that begins in the right padding."""
    out = (side + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= side + padding else out


class _MaxPool(torch.autograd.Function):
    """Max pooling. For the gradient it keeps only the places of the winners, counted in the window line by line."""

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
    """The gradient that ``max_pool_grad`` in C computes, by torch's operators, which can be differentiated again."""
    images, height, width, channels, out_height, out_width, kernel, stride, padding = geometry
    # The number of each window's winner in its image, line by line: [N, C, out_height, out_width].
    top = torch.arange(out_height, device=place.device)[:, None] * stride - padding
    left = torch.arange(out_width, device=place.device) * stride - padding
    pixel = (top + place // kernel) * width + left + place % kernel
    dx = grad.new_zeros(images, channels, height * width)
    rows = images, channels, out_height * out_width
    return dx.scatter_add(2, pixel.reshape(rows), grad.reshape(rows)).reshape(images, channels, height, width)
