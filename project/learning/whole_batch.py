"""Batch norm and dropout over the batches of all processes together: ``--trainer.sync_batchnorm``.

Torch's ``SyncBatchNorm`` runs on accelerators only, and Lightning's conversion permanently replaces the classes of a
net's layers. Here each layer keeps its class, its tensors and its name, and gets another ``forward`` while ``fit``
runs. The fused kernels (:mod:`project.models.kernels`) recognise such a layer and do not run. ``fit`` in R processes
then takes the same steps as one process with R times the batch, except for rounding, as sums have another order.

Batch norm: Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1 and the gradients of sec. 3), with ``N`` values per channel
in all processes together. Means and variances of the parts are combined as in Chan et al. 1983, Algorithms for
computing the sample variance (eq. 2.1). Forward and backward each need one collective operation per layer.
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
    """Makes the batch norms and dropouts of a module act on the images of all R processes: the whole batch.

    Image ``k`` of process ``r`` is image ``r + k R`` of the whole batch.

    Every process draws dropout's mask for the whole batch and uses its part of it. So the random generators of all
    processes must have the same state. Any other layer that draws random numbers then draws the same in each process.
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
    """The parts of all processes, concatenated along the first dimension. All parts must have the same shape."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def _norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """The ``forward`` of a batch norm in training.

    Without gradients the layer's own ``forward`` runs. One process alone may run a copy of the net without gradients,
    and a collective operation would wait forever for the others.
    """
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
    """Batch norm over all processes.

    It returns the output and, without gradients, the mean and the (biased) variance in float64 and the number of values
    that they are computed of.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Mean, variance and number of values of this process, [2 C + 1], and of all processes, [R, 2 C + 1].
        own_mean, own_var = torch.batch_norm_update_stats(x, None, None, 0.0)
        dtype = own_mean.dtype if weight is None else weight.dtype
        count = own_mean.new_tensor([x.numel() // x.shape[1]], dtype=torch.float64)
        parts = gather(torch.cat([own_mean.double(), own_var.double(), count])[None])
        channels = x.shape[1]
        means, variances, counts = parts.split([channels, channels, 1], dim=1)
        total = counts.sum()
        # Chan et al., eq. 2.1: the variance of all = mean of the variances + variance of the means.
        mean = (counts * means).sum(dim=0) / total
        var = (counts * (variances + (means - mean).square())).sum(dim=0) / total
        # `training=False` makes torch normalise with this mean and variance.
        y = nn.functional.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, False, 0.0, eps)
        ctx.eps, ctx.dtype = eps, dtype
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """``dx = gamma i (g - sum g / N - x' sum(g x') / N)``, with sums over all processes.

        Here ``g`` is the output's gradient, ``i = 1 / sqrt(var + eps)`` and ``x' = i (x - mean)``.
        """
        x, weight, mean, var, total = ctx.saved_tensors
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        saved = mean.to(ctx.dtype), var.to(ctx.dtype)
        wanted = [False, True, True]  # not dx, which needs the sums of all processes
        # In evaluation mode (False) torch computes the sums over this process: dweight = sum(g x'), dbias = sum g.
        # They stay its own, because DDP combines the gradients of parameters.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, *saved, None, None, False, ctx.eps, wanted
        )
        sums = torch.stack([dbias, dweight]).double()
        distributed.all_reduce(sums)
        of_ones, of_x = sums / total
        # The formula above as dx = scale g + slope x + offset: one pass over the map.
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
    """The ``forward`` of a dropout in training. It draws the mask of the whole batch and uses this process's part.

    The mask is the dropout of a map of ones. It has the memory format of ``x``, because the random numbers are drawn in
    the order of the memory.
    """
    if not dropout.training or dropout.p == 0:
        return type(dropout).forward(dropout, x)
    size, rank = distributed.get_world_size(), distributed.get_rank()
    ones = x.new_ones(size * len(x), *x.shape[1:])
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        ones = ones.contiguous(memory_format=torch.channels_last)
    return x * type(dropout).forward(dropout, ones)[rank::size]
