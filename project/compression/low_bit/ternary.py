"""Weights of two or three values: binary and ternary nets, trained through the rounding.

Binary weights (BWN): Rastegari et al. 2016, XNOR-Net (arXiv:1603.05279, sec. 3.1): ``sign(w)`` times the mean of
``|w|`` of the filter. Ternary weights (TWN): Li & Liu 2016 (arXiv:1605.04711, sec. 2.2): 0 below ``delta = 0.75
E|w|``, above it the sign times the mean of those ``|w|``. Trained ternary quantization (TTQ): Zhu et al. 2017
(arXiv:1612.01064, sec. 3): 0 below ``0.05 max |w|``, two learned values per layer for what is above it. All train float
weights of which the net sees the rounded ones; the gradient is the straight-through estimator (Bengio et al. 2013,
arXiv:1308.3432), of TTQ equations 7 and 8 of its paper.

Incremental freezing: Zhou et al. 2017, INQ (arXiv:1702.03044, sec. 2.2): the largest part of the weights is rounded
for good, the others make up for it; then the next part. Ours rounds to TWN's or BWN's values instead of powers of two,
with the scale of the first time.

Scales are per layer for TWN and TTQ, as published, and per filter for BWN. A norm after the layer takes scales up, so
that they matter to the gradient more than to the function.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Method = Literal["bwn", "twn", "ttq"]
_TWN_DELTA = 0.75
_TTQ_DELTA = 0.05


def binary_weight(weight: Tensor) -> Tensor:
    """``sign(w) mean|w|``, the mean over each filter ``[out, …]``; the sign of 0 is +. Straight-through gradient."""
    with torch.no_grad():
        scale = weight.flatten(1).abs().mean(1).view(-1, *[1] * (weight.dim() - 1))
        rounded = torch.where(weight >= 0, scale, -scale)
    return _straight_through(weight, rounded)


def ternary_weight(weight: Tensor) -> Tensor:
    """0 where ``|w| <= 0.75 E|w|``, else the sign times the mean of those ``|w|``. Straight-through gradient."""
    with torch.no_grad():
        size = weight.abs()
        large = size > _TWN_DELTA * size.mean()
        scale = (size * large).sum() / large.sum().clamp(min=1)
        rounded = torch.where(large, weight.sign() * scale, 0.0)
    return _straight_through(weight, rounded)


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor, bit for bit, and the gradient to the other."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight_through(weight: Tensor, rounded: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(weight, rounded)
    return result


class _TrainedTernary(torch.autograd.Function):
    """TTQ, eq. 6 to 8: a value learns from the sum of its weights' gradients, a weight from its own times its value."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, values: Tensor) -> Tensor:
        delta = _TTQ_DELTA * weight.abs().amax()
        positive, negative = weight > delta, weight < -delta
        ctx.save_for_backward(positive, negative, values)
        values = values.to(weight.dtype)
        return values[0] * positive - values[1] * negative

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        positive, negative, values = ctx.saved_tensors  # type: ignore[attr-defined]
        to_values = torch.stack([(gradient * positive).sum(), -(gradient * negative).sum()])
        factor = torch.where(positive, values[0], torch.where(negative, values[1], 1.0))
        return gradient * factor.to(gradient.dtype), to_values


def trained_ternary_weight(weight: Tensor, values: Tensor) -> Tensor:
    """``values[0]`` where ``w > 0.05 max|w|``, ``-values[1]`` where ``w < -0.05 max|w|``, else 0; TTQ's gradients.

    Args:
        weight: float weights of any shape.
        values: ``[2]``, both positive, float32.
    """
    result: Tensor = _TrainedTernary.apply(weight, values)
    return result


class LowBitWeights:
    """Puts binary or ternary weights into a net's forward pass, and at the end into its weights.

    Args:
        method: ``bwn``, ``twn`` or ``ttq``.
        layers: names of the convolutions and linear layers.

    Raises:
        ValueError: for another method, no layers.
    """

    def __init__(self, method: Method, layers: Sequence[str]) -> None:
        if method not in ("bwn", "twn", "ttq"):
            raise ValueError(f"method is {method!r}: choose bwn (binary), twn or ttq (ternary).")
        if not layers:
            raise ValueError("no layer is left to be rounded: exclude fewer of them.")
        self.method = method
        self.layers = list(layers)
        self.values: dict[str, Tensor] = {}
        """TTQ's two values of each layer, leaves that require a gradient once attached."""
        self._attached: list[nn.Module] = []

    def attach_(self, net: nn.Module) -> None:
        """From now on the net computes with rounded weights; once, however often it is said."""
        if self._attached:
            return
        for name in self.layers:
            module = net.get_submodule(name)
            assert isinstance(module, nn.Conv2d | nn.Linear)
            if self.method == "ttq" and name not in self.values:
                self.values[name] = _first_values(module.weight).requires_grad_()
            plain: Callable[..., Tensor] = (
                partial(nn.Conv2d._conv_forward, module) if isinstance(module, nn.Conv2d) else nn.functional.linear
            )
            module.forward = partial(self._forward, plain, name, module)  # type: ignore[method-assign]
            self._attached.append(module)

    def detach_(self) -> None:
        """The net computes with its float weights again."""
        for module in self._attached:
            del module.forward
        self._attached = []

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """What the net sees of a layer's float weights."""
        if self.method == "ttq":
            return trained_ternary_weight(weight, self.values[name])
        return binary_weight(weight) if self.method == "bwn" else ternary_weight(weight)

    @torch.no_grad()
    def write_(self, weights: dict[str, Tensor], prefix: str = "") -> None:
        """Round the layers' weights in a state dict, for good."""
        for name in self.layers:
            key = f"{prefix}{name}.weight"
            weights[key] = self.rounded(name, weights[key]).detach().clone()

    def _forward(self, plain: Callable[..., Tensor], name: str, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        return plain(x, self.rounded(name, module.weight), module.bias)


class Freezing:
    """Rounds growing parts of the weights for good, the largest first, while the others go on training (INQ).

    Args:
        low_bit: the values; ``bwn`` or ``twn``, since TTQ's are never final before the end.

    Raises:
        ValueError: for TTQ.
    """

    def __init__(self, low_bit: LowBitWeights) -> None:
        if low_bit.method == "ttq":
            raise ValueError("method is ttq, whose values are learned to the end: freeze with twn, or not at all.")
        self.low_bit = low_bit
        self.frozen: dict[str, Tensor] = {}
        """Of each layer: which weights are final."""
        self.targets: dict[str, Tensor] = {}
        """Of each layer: what each of its weights is to become, of the first rounding."""

    @torch.no_grad()
    def freeze_(self, net: nn.Module, portion: float) -> None:
        """Round the share ``portion`` of each layer's weights, those that are frozen included."""
        for name in self.low_bit.layers:
            weight = net.get_submodule(name).get_parameter("weight")
            rounded = self.low_bit.rounded(name, weight)
            if name in self.targets:  # later weights take the scale of the first
                scale = self.targets[name].abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
                rounded = rounded.sign() * scale
            frozen = self.frozen.get(name, torch.zeros_like(weight, dtype=torch.bool))
            size = weight.abs().masked_fill(frozen, torch.inf).flatten()
            count = round(portion * size.numel())
            chosen = torch.zeros_like(size, dtype=torch.bool)
            chosen[size.argsort(descending=True, stable=True)[:count]] = True
            chosen = chosen.view_as(weight)
            self.targets[name] = torch.where(frozen, self.targets.get(name, rounded), rounded)
            self.frozen[name] = chosen
        self.hold_(net)

    @torch.no_grad()
    def hold_(self, net: nn.Module) -> None:
        """Put the frozen weights back to their values, after an optimizer's step."""
        for name, frozen in self.frozen.items():
            weight = net.get_submodule(name).get_parameter("weight")
            weight.copy_(torch.where(frozen, self.targets[name], weight))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"frozen": dict(self.frozen), "targets": dict(self.targets)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.frozen, self.targets = dict(state["frozen"]), dict(state["targets"])


@torch.no_grad()
def _first_values(weight: Tensor) -> Tensor:
    """TTQ begins with the means of what is above its threshold (sec. 3.3 leaves the start open)."""
    delta = _TTQ_DELTA * weight.abs().amax()
    sides = [weight[weight > delta], -weight[weight < -delta]]
    return torch.stack([side.mean() if len(side) else weight.abs().mean() for side in sides]).float()
