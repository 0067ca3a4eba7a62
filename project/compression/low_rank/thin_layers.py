"""The plain layers that stand for one: the factors of its weight, with its stride, padding and dilation divided up.

In the net a layer ``name`` becomes an ``nn.Sequential`` of ``name.0``, ``name.1`` without norm or activation between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.compression.low_rank.factors import Kind, Ranks, factors_of, largest_ranks
from project.models.surgery import register_surgery

Layer = nn.Conv2d | nn.Linear
Axes = tuple[int, ...]

_AXES: dict[Kind, tuple[Axes, ...]] = {"svd": ((0, 1), ()), "spatial": ((0,), (1,)), "tucker": ((), (0, 1), ())}
"""Along which of height and width each factor acts."""


@register_surgery
@dataclass(frozen=True)
class Factorize:
    """Put thin layers in the place of some layers; their weights are the factors of the weight that is there.

    Args:
        kinds: of each layer, as in :mod:`project.compression.low_rank.factors`.
        ranks: of each layer: one number, of ``tucker`` two (in, out).
    """

    kinds: dict[str, Kind]
    ranks: dict[str, list[int]]

    def apply_(self, net: nn.Module) -> None:
        """Replace the layers of ``net`` in place.

        Raises:
            ValueError: when ``net`` lacks a layer or one is too small; ``net`` is then as it was.
        """
        thin = {name: self._thin(net, name) for name in self.kinds}
        for name, layers in thin.items():
            net.set_submodule(name, layers)

    def _thin(self, net: nn.Module, name: str) -> nn.Sequential:
        kind, ranks = self.kinds[name], tuple(self.ranks[name])
        layer = dict(net.named_modules()).get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise ValueError(
                f"{type(net).__name__} has no convolution or linear layer {name}: factorize the net that the plan was "
                "made for, and once."
            )
        largest = largest_ranks(layer.weight, kind)
        if any(rank > most for rank, most in zip(ranks, largest, strict=True)):
            raise ValueError(
                f"{name} is to get the ranks {list(ranks)}, but has {list(largest)} at most: factorize a net with the "
                "arguments of the one that the plan was made for."
            )
        return thin_layers(layer, kind, ranks)


@torch.no_grad()
def thin_layers(layer: Layer, kind: Kind, ranks: Ranks) -> nn.Sequential:
    """What takes the layer's place: the last one has its bias, the others have none."""
    weight, bias = layer.weight, layer.bias
    factors = factors_of(weight, kind, ranks)
    if isinstance(layer, nn.Linear):
        layers: list[nn.Conv2d | nn.Linear] = [_linear(factor) for factor in factors]
    else:
        layers = [thin_conv(layer, factor, axes) for factor, axes in zip(factors, _AXES[kind], strict=True)]
    for thin in layers:
        thin.weight.requires_grad_(weight.requires_grad)
    layers[-1].bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return nn.Sequential(*layers).train(layer.training)


def thin_conv(layer: nn.Conv2d, weight: Tensor, axes: Axes) -> nn.Conv2d:
    """A convolution with this weight that strides and pads as ``layer`` does, but along ``axes`` alone."""
    conv = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        _along(layer.stride, axes, 1),
        layer.padding if isinstance(layer.padding, str) else _along(layer.padding, axes, 0),
        _along(layer.dilation, axes, 1),
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",  # so that no random number is drawn for it
    )
    channels_last = not layer.weight.is_contiguous()
    order = torch.channels_last if channels_last else torch.contiguous_format
    conv.weight = nn.Parameter(weight.contiguous(memory_format=order))
    return conv


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous())
    return linear


def _along(values: tuple[int, ...], axes: Axes, otherwise: int) -> tuple[int, int]:
    return (values[0] if 0 in axes else otherwise, values[1] if 1 in axes else otherwise)
