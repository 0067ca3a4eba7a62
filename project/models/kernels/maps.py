"""The tensors that the kernels can read and write, and the addresses that they get."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from project.models.kernels.build import library

_TYPES = (Tensor, nn.Parameter)


def can_run(x: Tensor) -> bool:
    """A map ``[N, C, H, W]`` that the kernels can take: as in :func:`is_plain`, channels-last, float32 or bfloat16, the
    number of channels a multiple of 8. False where the kernels could not be built.
    """
    return (
        is_plain(x)
        and x.shape[1] % 8 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and library(x.dtype) is not None
    )


def is_plain(x: Tensor) -> bool:
    """Images or maps ``[N, C, H, W]`` in a CPU's memory, not empty, while gradients are recorded and torch runs each
    operation as it is called.
    """
    return (
        not is_transformed()
        and not is_watched()
        and type(x) is Tensor
        and x.is_cpu
        and x.layout is torch.strided
        and x.dim() == 4
        and x.numel() > 0
        and not x.is_neg()
        and torch.is_grad_enabled()
    )


def is_transformed() -> bool:
    """Whether torch makes something else of the operations than their results: it compiles or traces them, maps over
    them (``torch.func``) or takes derivatives forward. It can not look into a kernel.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_watched() -> bool:
    """Whether a mode (``TorchDispatchMode``, ``TorchFunctionMode``) wants to see each operator of torch."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0


def is_plain_gradient(grad: Tensor) -> bool:
    """Whether a kernel can take the gradient of its output: no graph of the backward pass is wanted (``create_graph``),
    torch runs each operation as it is called, and the gradient is an ordinary tensor in a CPU's memory.
    """
    return (
        not torch.is_grad_enabled()
        and not is_transformed()
        and not is_watched()
        and type(grad) is Tensor
        and grad.is_cpu
        and grad.layout is torch.strided
        and not grad.is_neg()
        and not grad._is_zerotensor()
        and not torch._C._functorch.is_legacy_batchedtensor(grad)  # ``is_grads_batched``
    )


def gradients_by_torch(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*inputs)`` by torch's operators, for a backward pass that no kernel can do. They can be
    differentiated again if torch records gradients (``create_graph``).

    Args:
        function: what the kernel computes, in torch's operators.
        inputs: its arguments.
        grad: gradient of its output.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [x.view_as(x) for x in inputs]  # one argument may be computed from another, or be the same tensor
        wanted = [x for x in own if x.requires_grad]
        y = function(*own)
        found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=create_graph))
    return tuple(next(found) if x.requires_grad else None for x in own)


def address(
    tensor: Tensor | None,
    dtype: torch.dtype,
    numel: int,
    order: torch.memory_format | None = torch.contiguous_format,
) -> int:
    """The address at which C finds exactly ``numel`` values of ``dtype``, without gaps, in this ``order``; 0 if the
    tensor's memory is not so. All addresses that C gets come from here.

    Args:
        tensor: ``None`` is in no memory.
        dtype: type of the values.
        numel: number of values, at least 1.
        order: memory format; ``None`` if C is told the strides.
    """
    if (
        tensor is not None
        and type(tensor) in _TYPES
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.numel() == numel
        and (order is None or tensor.is_contiguous(memory_format=order))
        and not tensor.is_neg()
    ):
        return tensor.data_ptr()
    return 0


def pointer(
    tensor: Tensor, dtype: torch.dtype, numel: int, order: torch.memory_format | None = torch.contiguous_format
) -> int:
    """The :func:`address` of a tensor that has one.

    Raises:
        AssertionError: if the tensor's memory is not what C reads or writes there.
    """
    if place := address(tensor, dtype, numel, order):
        return place
    raise AssertionError(
        f"a kernel wants {numel} values of {dtype} on the CPU in {order}, but it got {list(tensor.shape)} of "
        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
    )


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
