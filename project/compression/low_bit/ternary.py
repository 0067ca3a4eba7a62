"""Binary and ternary weights: each weight takes one of two or three values, and training goes through the rounding.

- Binary weights (BWN), Rastegari et al. 2016, XNOR-Net (arXiv:1603.05279, sec. 3.1): ``sign(w)`` times the mean of
  ``|w|`` over the filter.
- Ternary weights (TWN), Li & Liu 2016 (arXiv:1605.04711, sec. 2.2): 0 up to ``delta = 0.75 E|w|``. Above it,
  ``sign(w)`` times the mean of the ``|w|`` that are above ``delta``.
- Trained ternary quantization (TTQ), Zhu et al. 2017 (arXiv:1612.01064, sec. 3): 0 up to ``0.05 max |w|``. Above it,
  one of two learned values of the layer, by the sign of ``w``.

The optimizer trains float weights, and the net computes with the rounded ones. The gradient of BWN and TWN is the
straight-through estimator (Bengio et al. 2013, arXiv:1308.3432). The gradient of TTQ follows equations 7 and 8 of its
paper.

Incremental freezing, Zhou et al. 2017, INQ (arXiv:1702.03044, sec. 2.2): the weights of largest magnitude are rounded
for good, and the others are trained further to compensate for the error. Then the next part is rounded. Two deviations:
we round to the values of TWN or BWN instead of powers of two, and the scale is computed only once, at the first part.

TWN and TTQ have one scale per layer, as published, and BWN has one scale per filter. A norm after the layer removes the
scale, so the scale matters more for the gradient than for the output.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Method = Literal["bwn", "twn", "ttq"]
_TWN_DELTA = 0.75
_TTQ_DELTA = 0.05


def binary_weight(weight: Tensor) -> Tensor:
    """``sign(w) mean|w|``, with the mean over each filter, and + as the sign of 0. The gradient is straight-through.

    Args:
        weight: float weights ``[out_channels, ...]``.
    """
    with torch.no_grad():
        scale = weight.flatten(1).abs().mean(1).view(-1, *[1] * (weight.dim() - 1))
        rounded = torch.where(weight >= 0, scale, -scale)
    return _straight_through(weight, rounded)


def ternary_weight(weight: Tensor) -> Tensor:
    """0 where ``|w| <= 0.75 E|w|``, else ``sign(w)`` times the mean of all ``|w|`` above that threshold.

    The gradient is straight-through.

    Args:
        weight: float weights of a layer, of any shape.
    """
    with torch.no_grad():
        size = weight.abs()
        large = size > _TWN_DELTA * size.mean()
        scale = (size * large).sum() / large.sum().clamp(min=1)
        rounded = torch.where(large, weight.sign() * scale, 0.0)
    return _straight_through(weight, rounded)


class _StraightThrough(torch.autograd.Function):
    """Returns exactly the bits of ``rounded`` and passes the gradient to ``weight``."""

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
    """TTQ, eq. 6 to 8.

    The gradient of a learned value is the sum of the gradients of its weights, negated for negative weights. The
    gradient of a weight is multiplied by its learned value, or by 1 if the weight is rounded to 0.
    """

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
    """``values[0]`` where ``w > 0.05 max|w|``, ``-values[1]`` where ``w < -0.05 max|w|``, else 0; with TTQ's gradients.

    Args:
        weight: float weights of a layer, of any shape.
        values: two learned values ``[2]`` of the layer, float32, both above 0.
    """
    result: Tensor = _TrainedTernary.apply(weight, values)
    return result


class LowBitWeights:
    """Rounds the weights of a net to two or three values, in its forward pass or for good.

    Args:
        method: rounding method: ``bwn`` (binary), ``twn`` or ``ttq`` (both ternary).
        layers: names of the convolutions and linear layers to round, at least one.

    Raises:
        ValueError: if the method is unknown, or if there are no layers.
    """

    def __init__(self, method: Method, layers: Sequence[str]) -> None:
        if method not in ("bwn", "twn", "ttq"):
            raise ValueError(f"method is {method!r}: choose bwn (binary), twn or ttq (ternary).")
        if not layers:
            raise ValueError("no layer is left to round: exclude fewer layers, or include more.")
        self.method = method
        self.layers = list(layers)
        self.values: dict[str, Tensor] = {}
        """The two learned values of each layer for ``ttq``. After :meth:`attach_` they require a gradient."""
        self._layers: dict[str, nn.Module] = {}
        self._net: nn.Module | None = None
        self._own_forward: Callable[..., Any] | None = None

    def attach_(self, net: nn.Module) -> None:
        """Let the net compute with rounded weights. If it does so already, nothing changes.

        At each call of the net, every layer gets the rounded weight as an ordinary attribute, which hides the
        parameter ``weight``. So it holds for whatever code reads the weight: the layer, a subclass that normalises it
        first, or a net that does not call the layer, such as torch's ``TransformerEncoderLayer`` in evaluation.

        Args:
            net: net with the layers of ``layers``, whose weights are parameters of their own. Its forward method is
                replaced. (A hook would do too, but ``torch.compile`` does not see that one is added.)
        """
        if self._net is not None:
            return
        self._layers = {name: net.get_submodule(name) for name in self.layers}
        for name, layer in self._layers.items():
            if self.method == "ttq" and name not in self.values:
                self.values[name] = _first_values(layer.get_parameter("weight")).requires_grad_()
        self._net, self._own_forward = net, vars(net).get("forward")
        net.forward = partial(self._forward, net.forward)

    def detach_(self) -> None:
        """Let the net compute with its float weights again."""
        if self._net is not None:
            del self._net.forward
            if self._own_forward is not None:
                self._net.forward = self._own_forward
        self._net = None
        for layer in self._layers.values():
            vars(layer).pop("weight", None)

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """The rounded weights of a layer, as the forward pass uses them.

        Args:
            name: name of the layer, one of ``layers``.
            weight: float weights of the layer ``[out_channels, ...]``.
        """
        if self.method == "ttq":
            return trained_ternary_weight(weight, self.values[name])
        return binary_weight(weight) if self.method == "bwn" else ternary_weight(weight)

    @torch.no_grad()
    def write_(self, weights: dict[str, Tensor], prefix: str = "") -> None:
        """Replace the float weights in a state dict by the rounded ones.

        Args:
            weights: state dict with the layers' weights; it is changed in place.
            prefix: text before a layer's name in the keys of the state dict, such as ``net.``; empty by default.
        """
        for name in self.layers:
            key = f"{prefix}{name}.weight"
            weights[key] = self.rounded(name, weights[key]).detach().clone()

    def _forward(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for name, layer in self._layers.items():
            weight = layer._parameters["weight"]
            assert weight is not None
            vars(layer)["weight"] = self.rounded(name, weight)
        return plain(*args, **kwargs)


class Freezing:
    """Rounds a growing share of the weights for good, the largest first, while the others are trained further (INQ).

    Args:
        low_bit: layers and rounding method; ``bwn`` or ``twn``. The values of ``ttq`` change until training ends, so
            they cannot be frozen.

    Raises:
        ValueError: if the method is ``ttq``.
    """

    def __init__(self, low_bit: LowBitWeights) -> None:
        if low_bit.method == "ttq":
            raise ValueError(
                "method is ttq, but its values are trained until the end: choose twn, or leave freeze out."
            )
        self.low_bit = low_bit
        self.frozen: dict[str, Tensor] = {}
        """For each layer, a mask that is true for the weights that are rounded for good."""
        self.targets: dict[str, Tensor] = {}
        """For each layer, the rounded value of every weight, with the scale of the first rounding."""

    @torch.no_grad()
    def freeze_(self, net: nn.Module, portion: float) -> None:
        """Freeze a share of each layer's weights: those frozen before, and then the largest of the others.

        Args:
            net: net whose weights are rounded in place.
            portion: share of all weights of a layer that is frozen afterwards, in (0, 1].
        """
        for name in self.low_bit.layers:
            weight = net.get_submodule(name).get_parameter("weight")
            rounded = self.low_bit.rounded(name, weight)
            if name in self.targets:  # not the first part: use the scale of the first rounding
                scale = self.targets[name].abs()
                if self.low_bit.method == "bwn":  # one scale for each filter; twn has one for the whole layer
                    scale = scale.flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
                else:
                    scale = scale.amax()
                rounded = rounded.sign() * scale
            frozen = self.frozen.get(name, torch.zeros_like(weight, dtype=torch.bool))
            size = weight.abs().masked_fill(frozen, torch.inf).flatten()  # frozen weights come first
            count = round(portion * size.numel())
            chosen = torch.zeros_like(size, dtype=torch.bool)
            chosen[size.argsort(descending=True, stable=True)[:count]] = True
            chosen = chosen.view_as(weight)
            self.targets[name] = torch.where(frozen, self.targets.get(name, rounded), rounded)
            self.frozen[name] = chosen
        self.hold_(net)

    @torch.no_grad()
    def hold_(self, net: nn.Module) -> None:
        """Set the frozen weights to their rounded values again, after a step of the optimizer.

        Args:
            net: net whose frozen weights are overwritten in place.
        """
        for name, frozen in self.frozen.items():
            weight = net.get_submodule(name).get_parameter("weight")
            weight.copy_(torch.where(frozen, self.targets[name], weight))

    def to_(self, device: torch.device) -> None:
        """Move the masks and the rounded values to a device.

        Args:
            device: device of the net's weights.
        """
        self.frozen = {name: each.to(device) for name, each in self.frozen.items()}
        self.targets = {name: each.to(device) for name, each in self.targets.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The masks and the rounded values, as plain tensors."""
        return {"frozen": dict(self.frozen), "targets": dict(self.targets)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what :meth:`state_dict` saved.

        Args:
            state: dictionary with the keys ``frozen`` and ``targets``.
        """
        self.frozen, self.targets = dict(state["frozen"]), dict(state["targets"])


@torch.no_grad()
def _first_values(weight: Tensor) -> Tensor:
    """The first two values of a layer for TTQ: the mean magnitude above the threshold, on the positive and negative
    side.

    Section 3.3 of the paper leaves the start open. If a side is empty, the mean of all ``|w|`` is used.
    """
    delta = _TTQ_DELTA * weight.abs().amax()
    sides = [weight[weight > delta], -weight[weight < -delta]]
    return torch.stack([side.mean() if len(side) else weight.abs().mean() for side in sides]).float()
