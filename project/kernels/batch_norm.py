"""Batch norm followed by ReLU as one operation, for training on a CPU.

Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1 and the gradients of sec. 3). Torch's batch norm and ReLU read and write
a map a dozen times forward and backward, these nine times. One pixel is subtracted before squares are summed up (Chan
et al. 1983, shifted data), so float32 suffices. There is no second derivative: switch the kernels off for one
(``PROJECT_KERNELS=0``).
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from project.kernels.build import library
from project.kernels.maps import as_rows, can_run, is_watched


def batch_norm_relu(x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor | None:
    """``activation(norm(x))`` of a map ``[N, C, H, W]``, the running statistics updated; ``None`` where that is not
    batch norm in training and ReLU, or there is no kernel for the map (see :func:`project.kernels.maps.can_run`).

    The output differs from torch's by the rounding of its type; the sums' relative error is about 1e-6.
    """
    if not is_training_norm_relu(norm, activation) or not can_run(x):
        return None
    if x.numel() == x.shape[1]:  # torch refuses one value per channel, in its own words
        return None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    return _BatchNormReLU.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps)


def is_training_norm_relu(norm: nn.Module, activation: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether the two are batch norm in training, with parameters and running statistics, and ReLU; without hooks."""
    return (
        isinstance(norm, nn.BatchNorm2d)
        and isinstance(activation, nn.ReLU)
        and norm.training
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
        and norm.affine
        and not is_watched(norm)
        and not is_watched(activation)
    )


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        channels = x.shape[1]
        y, saved = torch.empty_like(x), weight.new_empty(4, channels)
        kernels = library(x.dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu(
            x.data_ptr(),
            x.numel() // channels,
            channels,
            weight.data_ptr(),
            bias.data_ptr(),
            eps,
            momentum,
            running_mean.data_ptr(),
            running_var.data_ptr(),
            saved.data_ptr(),
            y.data_ptr(),
        )
        if not done:
            raise MemoryError("no memory for the sums of a batch norm")
        ctx.save_for_backward(x, saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, saved = ctx.saved_tensors
        channels = x.shape[1]
        grad, stride = as_rows(grad.to(x.dtype))
        dx, dweight, dbias = torch.empty_like(x), saved.new_empty(channels), saved.new_empty(channels)
        kernels = library(x.dtype)
        assert kernels is not None
        done = kernels.batch_norm_relu_grad(
            x.data_ptr(),
            grad.data_ptr(),
            x.numel() // channels,
            channels,
            stride,
            saved.data_ptr(),
            dx.data_ptr(),
            dweight.data_ptr(),
            dbias.data_ptr(),
        )
        if not done:
            raise MemoryError("no memory for the sums of a batch norm's gradient")
        return dx, dweight, dbias, None, None, None, None
