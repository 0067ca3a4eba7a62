"""Checks of the tensors that the kernels read and write, and the addresses that the kernels get."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from project.models.kernels.build import library

_TYPES = (Tensor, nn.Parameter)


def can_run(x: Tensor) -> bool:
    """Whether the kernels can take a map ``[N, C, H, W]``.

    It must be plain (see :func:`is_plain`), channels-last, float32 or bfloat16, with a multiple of 8 channels. False
    if the kernels could not be built.
    """
    return (
        is_plain(x)
        and x.shape[1] % 8 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and library(x.dtype) is not None
    )


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor ``[N, C, H, W]`` in a CPU's memory, not empty.

    False if gradients are not recorded, or if torch does not run each operation at once when it is called.
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
    """Whether torch transforms the operations instead of only running them.

    It may compile or trace them, map over them (``torch.func``), or compute forward derivatives. Torch cannot look into
    a kernel, so a kernel must not run then.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_watched() -> bool:
    """Whether a mode (``TorchDispatchMode``, ``TorchFunctionMode``) is active, which must see each torch operator."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0


def is_plain_gradient(grad: Tensor) -> bool:
    """Whether a kernel can take ``grad``, the gradient of its output.

    It must be an ordinary tensor in a CPU's memory, and torch must run each operation at once when it is called. False
    if a graph of the backward pass is wanted (``create_graph``).
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
    """Gradients of ``function(*inputs)`` by torch's operators, for a backward pass that no kernel can do.

    They can be differentiated again if torch records gradients (``create_graph``).

    Args:
        function: function that computes the same as the kernel, with torch's operators.
        inputs: the arguments of ``function``, all of them tensors.
        grad: gradient of the output of ``function``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views are distinct tensors. Among the inputs, one may be computed from another, or two may be the same tensor.
        own = [x.view_as(x) for x in inputs]
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
    """The address of a tensor of exactly ``numel`` values of ``dtype``, without gaps, in the memory format ``order``.

    The result is 0 if the tensor's memory is not like this. All addresses that C gets come from this function.

    Args:
        tensor: tensor that C reads or writes. ``None`` gives the address 0.
        dtype: type of the tensor's values.
        numel: number of values that C expects, at least 1.
        order: memory format that C expects; ``None`` allows any strides, if C gets the strides too.
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
    """The :func:`address` of a tensor whose memory must be as C expects it.

    Raises:
        AssertionError: if the tensor's memory is not as C expects it.
    """
    if place := address(tensor, dtype, numel, order):
        return place
    raise AssertionError(
        f"a kernel wants {numel} values of {dtype} on the CPU in {order}, but it got {list(tensor.shape)} of "
        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
    )


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """The map as rows of pixels, each row with its channels side by side, and the distance between two rows in values.

    A slice of channels of a larger channels-last map (such as the gradient of one part of a concatenation) is such a
    map already and is not copied. Any other layout is copied.
    """
    # The distance of two pixels. A side of length 1 has no meaningful stride, so the first longer side gives it.
    _, channels, height, width = x.shape
    row = x.stride(3) if width > 1 else x.stride(2) if height > 1 else x.stride(0) if len(x) > 1 else channels
    if x.stride(1) == 1 and row >= channels and _matches(x, row):
        return x, row
    return x.contiguous(memory_format=torch.channels_last), channels


def _matches(x: Tensor, row: int) -> bool:
    """Whether each pixel of the map is ``row`` values behind the one before, over lines and images too."""
    images, _, height, width = x.shape
    return (
        (width == 1 or x.stride(3) == row)
        and (height == 1 or x.stride(2) == row * width)
        and (images == 1 or x.stride(0) == row * width * height)
    )
