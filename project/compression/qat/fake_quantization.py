"""Rounding to few bits in the forward pass of training, with gradients as if there were none.

Jacob et al. 2018 (arXiv:1712.05877, sec. 3: ranges of activations as moving averages, of weights as they are);
Krishnamoorthi 2018 (arXiv:1806.08342, sec. 3.2: a scale per output channel). The gradient is the straight-through
estimator (Bengio et al. 2013, arXiv:1308.3432, sec. 3.3), zero where a value was clipped.

A convolution's and linear layer's inputs are rounded rather than its outputs: the tensors are the same, after pooling
and concatenation, and what a layer feeds need not be known. Scales per channel make folding batch norm unnecessary: it
multiplies each channel of a weight by one number, which its scale follows.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, distributed, nn

from project.deployment.int8.observers import round_weight

_MOMENTUM = 0.01


class FakeQuantization:
    """Puts the rounding into a net's convolutions and linear layers and takes it out again.

    Args:
        num_bits: of the weights, 2 to 8.
        activations: round the layers' inputs to eight bits too.
        reduce_range: round the weights as ``Quantizer.reduce_range`` does; without ``activations`` it has no effect.

    Raises:
        ValueError: for another number of bits.
    """

    def __init__(self, num_bits: int = 8, activations: bool = True, reduce_range: bool = True) -> None:
        if not 2 <= num_bits <= 8:
            raise ValueError(f"weight_bits is {num_bits}: choose 2 to 8.")
        self.num_bits = num_bits
        self.activations = activations
        self.reduce_range = reduce_range and activations
        self._spans: dict[str, Tensor] = {}  # of each layer's inputs, low and high, on its device
        self._layers: list[nn.Module] = []

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of each layer's inputs: moving averages of the training batches' extremes."""
        return {name: (float(span[0]), float(span[1])) for name, span in self._spans.items()}

    @ranges.setter
    def ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._spans = {name: torch.tensor(span) for name, span in ranges.items()}

    def attach_(self, net: nn.Module) -> None:
        """From now on the net rounds; once, however often it is said."""
        if self._layers:
            return
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                plain: Callable[..., Tensor] = (
                    partial(nn.Conv2d._conv_forward, module) if isinstance(module, nn.Conv2d) else nn.functional.linear
                )
                module.forward = partial(self._forward, plain, name, module)  # type: ignore[method-assign]
                self._layers.append(module)

    def detach_(self) -> None:
        """The net computes as it did before; nothing happens where nothing was attached."""
        for module in self._layers:
            del module.forward
        self._layers = []

    def _forward(self, plain: Callable[..., Tensor], name: str, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        if self.activations:
            x = self._round_activation(name, x, update=module.training)
        return plain(x, fake_weight(module.weight, self.num_bits, reduce_range=self.reduce_range), module.bias)

    def _round_activation(self, name: str, x: Tensor, *, update: bool) -> Tensor:
        if update or name not in self._spans:
            seen = _of_all_processes(x.detach().amin().float().clamp(max=0), x.detach().amax().float().clamp(min=0))
            known = self._spans.get(name, seen).to(seen.device)
            self._spans[name] = torch.lerp(known, seen, _MOMENTUM)
        span = self._spans[name].to(x.device)
        return fake_activation(x, span[0], span[1])


def _of_all_processes(low: Tensor, high: Tensor) -> Tensor:
    """The lowest and the highest of a training in several processes, ``[2]``."""
    ends = torch.stack([-low, high])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    return torch.stack([-ends[0], ends[1]])


def fake_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` rounded to 256 values from ``low`` to ``high``, of which 0 is one; no gradient outside."""
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    with torch.no_grad():
        q = (x.float() / scale).round() + zero
        rounded = ((q.clamp(0, 255) - zero) * scale).to(x.dtype)
        inside = (q >= 0) & (q <= 255)
    return torch.where(inside, x + (rounded - x).detach(), rounded)


def fake_weight(weight: Tensor, num_bits: int, *, reduce_range: bool = False) -> Tensor:
    """``weight`` ``[out, ...]`` as :func:`project.deployment.int8.observers.round_weight` rounds it for the file, with
    the gradient of ``weight``.
    """
    integers, scales = round_weight(weight, num_bits, reduce_range=reduce_range)
    rounded = integers * scales.view(-1, *[1] * (weight.dim() - 1))
    return weight + (rounded - weight).detach()
