"""Which maps and modules the kernels can take, and how maps lie in memory."""

import torch
from torch import Tensor, nn

from project.kernels.build import library


def can_run(x: Tensor) -> bool:
    """A map ``[N, C, H, W]`` in a CPU's memory, channels-last, float32 or bfloat16, channels a multiple of 8, with
    gradients, not being traced or compiled; and the kernels could be built.
    """
    return (
        is_plain(x)
        and x.shape[1] % 8 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and library(x.dtype) is not None
    )


def is_plain(x: Tensor) -> bool:
    """Images or maps ``[N, C, H, W]`` in a CPU's memory, not empty, with gradients, not being traced or compiled."""
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and type(x) is Tensor
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def is_watched(module: nn.Module) -> bool:
    """Whether hooks wait for a call of the module, or its forward was replaced."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in vars(module)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """The map as rows of pixels with the channels side by side, and the distance of two rows: a slice of a
    concatenated gradient stays where it is, another layout is copied.
    """
    _, channels, height, width = x.shape
    row = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0) if len(x) > 1 else channels
    if x.stride(1) == 1 and row >= channels and _matches(x, row):
        return x, row
    return x.contiguous(memory_format=torch.channels_last), channels


def _matches(x: Tensor, row: int) -> bool:
    """Whether pixel after pixel lies ``row`` values apart."""
    images, _, height, width = x.shape
    return (
        (width == 1 or x.stride(3) == row)
        and (height == 1 or x.stride(2) == row * width)
        and (images == 1 or x.stride(0) == row * width * height)
    )
