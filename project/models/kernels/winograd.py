"""Winograd's convolution of channels-last maps in one pass, for inference on a CPU.

Lavin & Gray 2016 (arXiv:1509.09308, sec. 4); the mathematics is in :mod:`project.compression.winograd.convolution`.
The algorithm has three steps: a transform of the input's tiles, 36 small matrix products for F(4x4, 3x3), and a
transform of the products. If each step runs over the whole map, the transformed maps go through memory: 2.25 times the
input, and as much again of products. This takes longer than the saved multiplications. Here a few dozen tiles at a time
go through all three steps in the second-level cache. The products keep 14 tiles times 32 output channels in registers.

The operation is ``torch.ops.project.winograd``, so that counters of operations see it
(:mod:`project.metrics.complexity`). They count the multiplications of the matrix products.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from project.models.kernels.build import library, used
from project.models.kernels.maps import address, is_transformed, pointer


def can_run_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> bool:
    """Whether the kernel can compute a convolution of the map ``x`` ``[N, C, H, W]``. All of this must hold:

    - The map, the weight and the bias fit together and are in a CPU's memory, in float32.
    - The map or the weight is channels-last. Torch's convolution gives a channels-last map in both cases.
    - Nothing is traced, compiled or cast by autocast, and no gradient is wanted.
    - The kernels could be built.
    """
    return (
        not is_transformed()
        and type(x) is Tensor
        and _is_plain(x)
        and _is_plain(weight)
        and (bias is None or (_is_plain(bias) and address(bias, torch.float32, len(weight)) != 0))
        and x.dim() == 4
        and x.numel() > 0
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and x.shape[2] + 2 * padding[0] > 2 < x.shape[3] + 2 * padding[1]
        and (
            x.is_contiguous(memory_format=torch.channels_last)
            or weight.is_contiguous(memory_format=torch.channels_last)
        )
        and not torch.is_autocast_enabled("cpu")
        and library(torch.float32) is not None
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values are in a CPU's memory in float32, with any strides, and no gradient is wanted."""
    in_any_order = address(tensor, torch.float32, tensor.numel(), None)
    return bool(in_any_order) and not (tensor.requires_grad and torch.is_grad_enabled())


def winograd(
    x: Tensor, panels: Tensor, bias: Tensor | None, out_channels: int, tile: int, padding: Sequence[int]
) -> Tensor:
    """Convolution 3x3 with stride 1 by F(tile x tile, 3x3).

    Args:
        x: map ``[N, C, H, W]`` for which :func:`can_run_winograd` is true.
        panels: transformed weight in the order of :func:`pack_panels`.
        bias: bias ``[out_channels]``; ``None`` means no bias.
        out_channels: number of output channels of the weight, at least 1.
        tile: side of a tile of the output in pixels, 2 or 4.
        padding: number of zeros above and below, and number of zeros left and right, 0 or more.
    """
    return _OPERATION(x, panels, bias, out_channels, tile, padding)


def pack_panels(transformed: Tensor) -> Tensor:
    """A transformed weight ``[side, side, C, K]`` in the order in which the kernel reads it.

    The output channels are cut into panels of two vectors. The last panel is filled with zeros to one or two vectors.
    """
    lanes, out_channels = _kernels().winograd_lanes(), transformed.shape[3]
    padded = torch.nn.functional.pad(transformed.flatten(0, 1), (0, _whole_vectors(out_channels) - out_channels))
    return torch.cat([panel.flatten() for panel in padded.split(2 * lanes, dim=2)])


def _whole_vectors(out_channels: int) -> int:
    """The number of output channels rounded up to whole vectors."""
    return out_channels + -out_channels % _kernels().winograd_lanes()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in a CPU's memory have the same shape, strides and bits; False if they have gaps in memory.

    ``torch.equal`` takes ten times as long.
    """
    if one.shape != other.shape or one.stride() != other.stride() or one.dtype != other.dtype or not _is_dense(one):
        return False
    starts = [pointer(tensor, one.dtype, one.numel(), None) for tensor in (one, other)]
    return _kernels().memcmp(*starts, one.nbytes) == 0


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has no gaps in memory: from the first to the last value there are as many places as values."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) == tensor.numel()


def count_tiles(side: int, tile: int) -> int:
    """Number of tiles along a side of the output. A last tile that reaches beyond the output costs the same."""
    return -(-side // tile)


def _kernels() -> Any:
    kernels = library(torch.float32)
    assert kernels is not None, "there is no kernel: call can_run_winograd first"
    return kernels


def _run(
    x: Tensor, panels: Tensor, bias: Tensor | None, out_channels: int, tile: int, padding: Sequence[int]
) -> Tensor:
    """The implementation of ``torch.ops.project.winograd`` on a CPU; for the arguments see :func:`winograd`."""
    images, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    sides = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
    y = torch.empty((images, out_channels, *sides), dtype=x.dtype, memory_format=torch.channels_last)
    kernels, single = _kernels(), torch.float32
    num_weights = (tile + 2) ** 2 * channels * _whole_vectors(out_channels)
    done = kernels.winograd(
        pointer(x, single, x.numel(), torch.channels_last),
        *(images, height, width, channels, out_channels, *padding, tile),
        pointer(panels, single, num_weights),
        None if bias is None else pointer(bias, single, out_channels),
        pointer(y, single, y.numel(), torch.channels_last),
    )
    if not done:
        raise MemoryError("there is no memory for the tiles of a Winograd convolution: choose a smaller batch_size")
    used.add("winograd")
    return y


_LIBRARY = torch.library.Library("project", "FRAGMENT")
_LIBRARY.define("winograd(Tensor x, Tensor panels, Tensor? bias, int out_channels, int tile, int[2] padding) -> Tensor")
_LIBRARY.impl("winograd", _run, "CPU")
_OPERATION = torch.ops.project.winograd.default


@register_flop_formula(torch.ops.project.winograd)
def _flops(
    x: torch.Size,
    panels: torch.Size,
    bias: torch.Size | None,
    out_channels: int,
    tile: int,
    padding: Sequence[int],
    out_shape: torch.Size | None = None,
    **_: Any,
) -> int:
    """Two FLOPs for each multiplication of the matrix products, as torch counts any other convolution."""
    images, channels, height, width = x
    down, across = (count_tiles(side + 2 * pad - 2, tile) for side, pad in zip((height, width), padding, strict=True))
    return 2 * images * down * across * (tile + 2) ** 2 * channels * out_channels
