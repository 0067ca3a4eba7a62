"""Turns batch norms into a scale and a shift and rounds these, so that they take few bytes in a file.

Batch norm in eval mode is ``x * scale + shift`` with ``scale = weight / sqrt(var + eps)`` and
``shift = bias - mean * scale`` (Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 2, line 11). A folded norm has ``scale``
as its weight, ``shift`` as its bias, 0 as its running mean and ``1 - eps`` as its running variance. The module and its
keys stay, and the statistics are constants that need no space in a file.

The scale is not folded into the convolution: each channel would multiply the few shared values of the layer by another
number, so that they would not be shared any more.

When the weights have changed, the statistics are computed again from training images: Sun et al. 2019
(arXiv:1810.05723), on batch norm statistics under quantization.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_statistics_(net: nn.Module, images: Tensor, batch_size: int = 256) -> None:
    """Compute the running statistics of every batch norm again, as means over batches of images, without dropout.

    Args:
        net: net whose statistics are replaced in place; it is left in eval mode.
        images: training images ``[N, C, H, W]``, normalised as the net expects them.
        batch_size: number of images in a batch, 1 or more. Images that do not fill the last batch are left out, unless
            there are fewer images than one batch.
    """
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    states = [deepcopy(norm.state_dict()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches instead of a moving average
        norm.train()
    whole = len(images) // batch_size * batch_size or len(images)
    for batch in images[:whole].split(batch_size):
        net(batch)
    for norm, momentum, state in zip(norms, momenta, states, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked == 0:  # a subclass whose statistics stay, or a norm that did not run
            norm.load_state_dict(state)
        norm.eval()


@torch.no_grad()
def fold_norms_(net: nn.Module, num_bits: int | None = None) -> None:
    """Fold the running statistics of each batch norm into its weight and bias.

    In eval mode the outputs stay the same up to rounding. A second call changes nothing. Do not train the net
    afterwards: in training mode batch norm still uses the statistics of the batch. Norms without weight and bias, and
    norms without running statistics, are not changed. Neither are subclasses and norms with a computed weight whose
    outputs would change.

    Args:
        net: net whose batch norms are folded in place.
        num_bits: number of bits that the scales are rounded to, 2 or more, before the shifts are computed from them.
            The step is the one with the least error of the norm's outputs. So a channel that is almost constant, whose
            scale is up to ``1 / sqrt(eps)``, does not take the bits of the others: its scale becomes smaller, and its
            shift keeps its output. ``None`` rounds nothing.
    """
    for norm in net.modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or not norm.affine:
            continue
        assert norm.running_var is not None
        constant = torch.full_like(norm.running_var, 1 - norm.eps)
        if torch.equal(norm.running_var, constant) and not norm.running_mean.any():
            continue  # folded already
        if (type(norm).forward is not _BatchNorm.forward or "weight" not in norm._parameters) and not _folds(norm):
            continue
        _fold_(norm, num_bits)


def _fold_(norm: _BatchNorm, num_bits: int | None = None) -> None:
    """Fold the running statistics of one norm into its weight and bias, with its scales rounded to ``num_bits``."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    if num_bits is not None:
        scale = _least_error(scale, norm, num_bits)
    norm.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
    norm.weight.copy_(scale)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


def _folds(norm: _BatchNorm) -> bool:
    """Whether a norm gives the same in eval mode once it is folded, as tried on a copy."""
    folded = deepcopy(norm)
    _fold_(folded)
    return torch.allclose(_answer(folded), _answer(norm), 1e-4, 1e-5)


def _answer(norm: _BatchNorm) -> Tensor:
    """What a norm gives in eval mode for random inputs, which are the same in each call."""
    training, pixels = norm.training, [] if isinstance(norm, nn.BatchNorm1d) else [4, 4]
    if isinstance(norm, nn.BatchNorm3d):
        pixels.append(4)
    x = 3 * torch.randn(8, len(norm.weight), *pixels, generator=torch.Generator().manual_seed(0)).to(norm.weight)
    answer: Tensor = norm.eval()(x)
    norm.train(training)
    return answer


@torch.no_grad()
def round_vectors_(net: nn.Module, num_bits: int = 8) -> None:
    """Round all biases and all scales and shifts of norms by :func:`fixed_point`, each tensor with a step of its own.

    Args:
        net: net whose parameters of at most one dimension are rounded in place.
        num_bits: number of bits of each value with its sign, 2 or more.
    """
    for parameter in net.parameters():
        if parameter.dim() <= 1:
            parameter.copy_(fixed_point(parameter, num_bits))


def fixed_point(x: Tensor, num_bits: int) -> Tensor:
    """``x`` rounded to multiples of a step, which is a power of two.

    The step is the smallest one with which all multiples fit in ``num_bits`` bits with a sign. The error is at most
    half a step, which is below ``2 ** (2 - num_bits)`` times the largest magnitude.

    Args:
        x: tensor of finite numbers, of any shape.
        num_bits: number of bits of each value with its sign, 2 or more.
    """
    exponent = _exponent(x, num_bits)
    return x.clone() if exponent is None else _rounded(x, exponent, num_bits)


def _exponent(x: Tensor, num_bits: int) -> int | None:
    """The exponent of the smallest step with which all multiples fit; ``None`` if all of ``x`` is 0."""
    most = 2 ** (num_bits - 1) - 1
    greatest = float(x.abs().max()) if x.numel() else 0.0
    if greatest == 0:
        return None
    exponent = math.floor(math.log2(greatest / most))
    while round(math.ldexp(greatest, -exponent)) > most:
        exponent += 1
    return exponent


def _rounded(x: Tensor, exponent: int, num_bits: int) -> Tensor:
    """``x`` rounded to multiples of ``2 ** exponent``; what does not fit in the bits becomes the largest that does."""
    most, step = 2 ** (num_bits - 1) - 1, 2.0**exponent
    return (x.double() / step).round().clamp(-most, most).to(x.dtype) * step


def _least_error(scale: Tensor, norm: _BatchNorm, num_bits: int) -> Tensor:
    """``scale`` rounded with the step with which the outputs of the norm have the least error, its shift included."""
    assert norm.running_mean is not None and norm.running_var is not None
    bias, mean, variance = norm.bias.double(), norm.running_mean.double(), norm.running_var.double()

    def error(rounded: Tensor) -> float:
        shift = bias - mean * rounded
        return float(((rounded - scale).square() * variance + (fixed_point(shift, num_bits) - shift).square()).sum())

    exponent = _exponent(scale, num_bits)
    if exponent is None:
        return scale
    choices = [_rounded(scale, exponent - smaller, num_bits) for smaller in range(24)]
    return min(choices, key=error)
