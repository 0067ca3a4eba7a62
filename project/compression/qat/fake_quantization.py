"""Fake quantization: the forward pass of training rounds to few bits, and the gradient ignores the rounding.

Jacob et al. 2018 (arXiv:1712.05877, sec. 3): the range of activations is a moving average, and the range of weights is
that of their present values. Krishnamoorthi 2018 (arXiv:1806.08342, sec. 3.2): one scale per output channel. The
gradient is the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432, sec. 3.3), and 0 where an activation
was clipped.

The inputs of convolutions and linear layers are rounded, not their outputs. These are the same tensors, after pooling
and concatenation, and no layer must know which layers read its output. Batch norm need not be folded before rounding:
folding multiplies each output channel of a weight by one number, and the scale of that channel changes by the same
number.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from project.compression.plain_layers import computes_as_plain, name_layers, other_layers
from project.deployment.int8.observers import round_weight

_MOMENTUM = 0.01


class FakeQuantization:
    """Adds the rounding to the convolutions and linear layers of a net, and removes it again.

    Args:
        num_bits: number of bits of the weights, 2 to 8.
        activations: whether to round the inputs of the layers too, to eight bits.
        reduce_range: whether to round the weights as ``Quantizer.reduce_range`` does. Without ``activations`` it has no
            effect.

    Raises:
        ValueError: if the number of bits is outside its range.
    """

    def __init__(self, num_bits: int = 8, activations: bool = True, reduce_range: bool = True) -> None:
        if not 2 <= num_bits <= 8:
            raise ValueError(f"weight_bits is {num_bits}: choose 2 to 8.")
        self.num_bits = num_bits
        self.activations = activations
        self.reduce_range = reduce_range and activations
        self._spans: dict[str, Tensor] = {}  # range (low, high) of each layer's inputs, on its device
        self._layers: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The range (low, high) of each layer's inputs: moving averages of the extremes of the training batches."""
        return {name: (float(span[0]), float(span[1])) for name, span in self._spans.items()}

    @ranges.setter
    def ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._spans = {name: torch.tensor(span) for name, span in ranges.items()}

    @staticmethod
    def left_out(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, str]:
        """The layers that do not round, each with the reason, by name.

        Args:
            net: net whose other convolutions and linear layers round; it is not changed.
            image_shape: shape (C, H, W) of an image.

        Raises:
            ValueError: if no layer is left that rounds.
        """
        left = other_layers(net, image_shape, computed=True)
        layers = {name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        if not layers - left.keys():
            why = name_layers(left) or f"{type(net).__name__} has no convolution and no linear layer"
            raise ValueError(f"no layer can be rounded: {why}. Leave QuantizationAwareTraining out.")
        return left

    def attach_(self, net: nn.Module) -> None:
        """Let the net round in its forward pass. If it does so already, nothing changes.

        Args:
            net: net whose convolutions and linear layers round; their forward methods are replaced. A subclass with a
                forward of its own does not round (:func:`project.compression.plain_layers.computes_as_plain`).
        """
        if self._layers:
            return
        for name, module in net.named_modules():
            if computes_as_plain(module):
                plain: Callable[..., Tensor] = (
                    partial(nn.Conv2d._conv_forward, module) if isinstance(module, nn.Conv2d) else nn.functional.linear
                )
                module.forward = partial(self._forward, plain, name, module)  # type: ignore[method-assign]
                self._hooks.append(module.register_forward_pre_hook(_watch))
                self._layers.append(module)

    def detach_(self) -> None:
        """Remove the rounding, so that the net computes as before. Without a net attached, nothing happens."""
        for module in self._layers:
            del module.forward
        for hook in self._hooks:
            hook.remove()
        self._layers, self._hooks = [], []

    def _forward(self, plain: Callable[..., Tensor], name: str, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        if self.activations:
            x = self._round_activation(name, x, update=module.training)
        return plain(x, fake_weight(module.weight, self.num_bits, reduce_range=self.reduce_range), module.bias)

    def _round_activation(self, name: str, x: Tensor, *, update: bool) -> Tensor:
        """The rounded inputs of a layer. In training its range is updated first."""
        if update or name not in self._spans:
            seen = _of_all_processes(x.detach().amin().float().clamp(max=0), x.detach().amax().float().clamp(min=0))
            known = self._spans.get(name, seen).to(seen.device)
            self._spans[name] = torch.lerp(known, seen, _MOMENTUM)
        span = self._spans[name].to(x.device)
        return fake_activation(x, span[0], span[1])


def _watch(layer: nn.Module, args: tuple[object, ...]) -> None:
    """A hook that does nothing. Torch's ``TransformerEncoderLayer`` calls its layers in evaluation if one has a hook.

    Without hooks it computes from their weights and never calls their ``forward``.
    """


def _of_all_processes(low: Tensor, high: Tensor) -> Tensor:
    """The lowest and the highest value over all training processes, ``[2]``."""
    ends = torch.stack([-low, high])  # one maximum gives both ends
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    return torch.stack([-ends[0], ends[1]])


def fake_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` rounded to 256 values that reach from ``low`` to ``high``; one of them is 0. The gradient outside is 0.

    Scale and zero point are those of :meth:`project.deployment.int8.observers.Scale.of_range`.

    Args:
        x: activations of any shape.
        low: lower end of the range, a scalar; 0 or below.
        high: upper end of the range, a scalar; 0 or above.
    """
    exact = -low / ((high - low) / 255).clamp(min=1e-12)
    zeros = torch.stack([exact.floor(), exact.ceil()])
    below, above = (-low / zeros).nan_to_num(0.0), (high / (255 - zeros)).nan_to_num(0.0)  # 0 / 0: the side is empty
    scale, chosen = torch.maximum(below, above).clamp(min=1e-12).min(0)
    zero = zeros[chosen]
    with torch.no_grad():
        q = (x.float() / scale).round() + zero
        rounded = ((q.clamp(0, 255) - zero) * scale).to(x.dtype)
        inside = (q >= 0) & (q <= 255)
    return torch.where(inside, x + (rounded - x).detach(), rounded)


def fake_weight(weight: Tensor, num_bits: int, *, reduce_range: bool = False) -> Tensor:
    """The weight as it is rounded in the quantized file; the gradient is passed on to ``weight`` unchanged.

    The rounding is that of :func:`project.deployment.int8.observers.round_weight`.

    Args:
        weight: float weight ``[out_channels, ...]``.
        num_bits: number of bits, 2 to 8.
        reduce_range: whether to limit the integers so that sums of products cannot overflow; see ``round_weight``.
    """
    integers, scales = round_weight(weight, num_bits, reduce_range=reduce_range)
    rounded = integers * scales.view(-1, *[1] * (weight.dim() - 1))
    return weight + (rounded - weight).detach()
