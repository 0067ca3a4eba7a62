"""Winograd's convolution of channels-last maps in one pass, for inference on a CPU.

Lavin & Gray 2016 (arXiv:1509.09308, sec. 4); the mathematics is in :mod:`project.compression.winograd.convolution`.
Written step by step (transform, 36 small matrix products, transform) the transformed maps, 2.25 times the input and as
much again of products for F(4x4, 3x3), go through memory, which takes longer than what is saved. Here a few dozen tiles
at a time go through all steps in the second-level cache, and the products keep 14 tiles times 32 output channels in
registers.

The operation is ``torch.ops.project.winograd``, so that what counts operations sees it
(:mod:`project.metrics.complexity`); counted are the multiplications of the products.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from project.models.kernels.build import library, used
from project.models.kernels.maps import address, is_transformed, pointer


def can_run_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> bool:
    """A map ``[N, C, H, W]``, a weight and a bias that fit it, in a CPU's memory, float32, map or weight channels-last
    (torch's convolution makes a channels-last map of either), nothing traced, compiled or cast by autocast, no gradient
    wanted; and the kernels could be built.
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
    """Whether the values lie in a CPU's memory in float32, in any order, and no gradient is wanted."""
    in_any_order = address(tensor, torch.float32, tensor.numel(), None)
    return bool(in_any_order) and not (tensor.requires_grad and torch.is_grad_enabled())


def winograd(
    x: Tensor, panels: Tensor, bias: Tensor | None, out_channels: int, tile: int, padding: Sequence[int]
) -> Tensor:
    """Convolution 3x3 with stride 1 by F(tile x tile, 3x3).

    Args:
        x: see :func:`can_run_winograd`.
        panels: the weight's, of :func:`pack_panels`.
        bias: ``[out_channels]``.
        out_channels: of the weight.
        tile: side of a tile of the output, 2 or 4.
        padding: zeros above and below, left and right.
    """
    return _OPERATION(x, panels, bias, out_channels, tile, padding)


def pack_panels(transformed: Tensor) -> Tensor:
    """A transformed weight ``[side, side, C, K]`` in the order in which the kernel reads it: panels of as many output
    channels as two vectors hold, of which the last is filled up with zeros to one or two.
    """
    lanes, out_channels = _kernels().winograd_lanes(), transformed.shape[3]
    padded = torch.nn.functional.pad(transformed.flatten(0, 1), (0, _whole_vectors(out_channels) - out_channels))
    return torch.cat([panel.flatten() for panel in padded.split(2 * lanes, dim=2)])


def _whole_vectors(out_channels: int) -> int:
    """The number of output channels rounded up to whole vectors."""
    return out_channels + -out_channels % _kernels().winograd_lanes()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in a CPU's memory are equal in shape, order and every bit; ``torch.equal`` takes ten times as
    long. False for tensors with gaps in memory.
    """
    if one.shape != other.shape or one.stride() != other.stride() or one.dtype != other.dtype or not _is_dense(one):
        return False
    starts = [pointer(tensor, one.dtype, one.numel(), None) for tensor in (one, other)]
    return _kernels().memcmp(*starts, one.nbytes) == 0


def _is_dense(tensor: Tensor) -> bool:
    """Whether from the first to the last value there are as many places in memory as values."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) == tensor.numel()


def count_tiles(side: int, tile: int) -> int:
    """Tiles along a side of the output: a last one that reaches beyond it costs as much as a whole one."""
    return -(-side // tile)


def _kernels() -> Any:
    kernels = library(torch.float32)
    assert kernels is not None, "there is no kernel: ask can_run_winograd first"
    return kernels


def _run(
    x: Tensor, panels: Tensor, bias: Tensor | None, out_channels: int, tile: int, padding: Sequence[int]
) -> Tensor:
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
        raise MemoryError("no memory for the tiles of a convolution")
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
    """Two for each multiplication of the products, as for any other convolution."""
    images, channels, height, width = x
    down, across = (count_tiles(side + 2 * pad - 2, tile) for side, pad in zip((height, width), padding, strict=True))
    return 2 * images * down * across * (tile + 2) ** 2 * channels * out_channels
