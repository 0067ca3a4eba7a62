"""Norms as scale and shift, and both on a coarse grid: what stands beside shared weights in a small file.

Batch norm in eval mode is ``x * scale + shift`` with ``scale = weight / sqrt(var + eps)`` and
``shift = bias - mean * scale`` (Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 2, line 11). Folded, a norm's weight and
bias are these two, its running mean is 0 and its running variance ``1 - eps``: module and keys stay, the statistics are
constants that need no room in a file. They are not folded into the convolution, whose few shared values would become
different ones in every channel. Statistics anew from training images once the weights have changed: Sun et al. 2019
(arXiv:1810.05723), batch norm's statistics under quantization.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_statistics_(net: nn.Module, images: Tensor, batch_size: int = 256) -> None:
    """Running statistics of every batch norm: the means over batches of these images; dropout is off.

    Args:
        net: is left in eval mode.
        images: ``[N, C, H, W]`` as the net takes them.
        batch_size: the last images are left out where they do not fill a batch, unless they are all there are.
    """
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    whole = len(images) // batch_size * batch_size or len(images)
    for batch in images[:whole].split(batch_size):
        net(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def fold_norms_(net: nn.Module) -> None:
    """Each batch norm's statistics into its weight and bias; in eval mode the net computes what it did, up to rounding.

    A second time changes nothing. In training mode batch norm takes the batch's statistics all the same: the net is
    meant to be finished. Without weight and bias, or without statistics, there is nothing to fold into or to fold.
    """
    for norm in net.modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or not norm.affine:
            continue
        assert norm.running_var is not None
        constant = torch.full_like(norm.running_var, 1 - norm.eps)
        if torch.equal(norm.running_var, constant) and not norm.running_mean.any():
            continue
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        norm.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
        norm.weight.copy_(scale)
        norm.running_mean.zero_()
        norm.running_var.copy_(constant)


@torch.no_grad()
def round_vectors_(net: nn.Module, num_bits: int = 8) -> None:
    """Norms' scales and shifts and all biases to :func:`fixed_point`, a step for each tensor."""
    for parameter in net.parameters():
        if parameter.dim() <= 1:
            parameter.copy_(fixed_point(parameter, num_bits))


def fixed_point(x: Tensor, num_bits: int) -> Tensor:
    """``x`` rounded to multiples of the smallest power of two with which all are integers of so many bits, with sign.

    The error is at most half a step, which is under ``2 ** (2 - num_bits)`` of the greatest magnitude.
    """
    most = 2 ** (num_bits - 1) - 1
    greatest = float(x.abs().max()) if x.numel() else 0.0
    if greatest == 0:
        return x.clone()
    exponent = math.floor(math.log2(greatest / most))
    while round(math.ldexp(greatest, -exponent)) > most:
        exponent += 1
    step = 2.0**exponent
    return (x.double() / step).round().to(x.dtype) * step
