"""Layers that see the batch of all processes, batch norm's statistics, dropout's draws: ``--trainer.sync_batchnorm``.

Torch's ``SyncBatchNorm`` runs on accelerators alone, and Lightning puts other classes in the place of a net's own ones
for good. Here each layer keeps its class, its tensors and its name, and gets another ``forward`` while a fit lasts; the
fused kernels (:mod:`project.models.kernels`) step aside for such a layer by themselves. Then a fit in R processes takes
the steps of one process with R times the batch, up to the order of sums.

Batch norm: Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1 and the gradients of sec. 3), with ``N`` values per channel
in all processes together. Means and variances of the parts are combined as in Chan et al. 1983, Algorithms for
computing the sample variance (eq. 2.1). Forward and backward each take one collective per layer.
"""

from types import MethodType
from typing import Any

import torch
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from project.models.layers import DropPath

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath)


class WholeBatch(LayerSync):
    """Batch norms and dropouts of a module that act on the images of all processes, place ``k`` of process ``r`` being
    place ``r + k R`` of the whole batch.

    Every process draws dropout's mask for the whole batch and takes its part, so generators have to be in the same
    state; what other layers draw then repeats in each process.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.forward = MethodType(_norm, module)  # type: ignore[method-assign]
            elif isinstance(module, _DROPOUTS):
                module.forward = MethodType(_drop, module)  # type: ignore[method-assign]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if getattr(vars(module).get("forward"), "__func__", None) in (_norm, _drop):
                del module.forward
        return model


def gather(part: Tensor) -> Tensor:
    """The parts of all processes, which are of one shape, one after the other along the first dimension."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Batch norm in training. Without gradients it is the layer's own: one process may look at a copy alone."""
    if not (norm.training and torch.is_grad_enabled()):
        return type(norm).forward(norm, x)
    norm._check_input_dim(x)
    y, mean, var, count = _NormOfAll.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), momentum)
    return y


class _NormOfAll(torch.autograd.Function):
    """Returns the output and, without gradients, mean and variance (biased) in float64, and their number of values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own_mean, own_var = torch.batch_norm_update_stats(x, None, None, 0.0)
        dtype = own_mean.dtype if weight is None else weight.dtype
        count = own_mean.new_tensor([x.numel() // x.shape[1]], dtype=torch.float64)
        parts = gather(torch.cat([own_mean.double(), own_var.double(), count])[None])
        channels = x.shape[1]
        means, variances, counts = parts.split([channels, channels, 1], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        var = (counts * (variances + (means - mean).square())).sum(dim=0) / total
        y = nn.functional.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, False, 0.0, eps)
        ctx.eps, ctx.dtype = eps, dtype
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """With ``i = 1 / sqrt(var + eps)``, ``x' = i (x - mean)`` and sums over all processes,
        ``dx = gamma i (g - sum g / N - x' sum(g x') / N)``.
        """
        x, weight, mean, var, total = ctx.saved_tensors
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        saved = mean.to(ctx.dtype), var.to(ctx.dtype)
        wanted = [False, True, True]
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, *saved, None, None, False, ctx.eps, wanted
        )
        sums = torch.stack([dbias, dweight]).double()
        distributed.all_reduce(sums)
        of_ones, of_x = sums / total
        inverse = (var + ctx.eps).rsqrt()
        scale = inverse if weight is None else weight.double() * inverse
        slope = -scale * inverse * of_x
        shape = [1, -1, *[1] * (x.dim() - 2)]
        offset, slope, scale = (
            each.to(torch.promote_types(x.dtype, torch.float32)).view(shape)
            for each in (-scale * of_ones - slope * mean, slope, scale)
        )
        dx = torch.addcmul(offset, x, slope).addcmul_(grad, scale).to(x.dtype)
        return dx, None if weight is None else dweight, None if weight is None else dbias, None


def _drop(dropout: Any, x: Tensor) -> Tensor:
    """The mask is that of the whole batch: dropout of ones, in the order in memory that the whole map would have."""
    if not dropout.training or dropout.p == 0:
        return type(dropout).forward(dropout, x)
    size, rank = distributed.get_world_size(), distributed.get_rank()
    ones = x.new_ones(size * len(x), *x.shape[1:])
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        ones = ones.contiguous(memory_format=torch.channels_last)
    return x * type(dropout).forward(dropout, ones)[rank::size]
