"""The thin layers that replace one layer. Their weights are the factors of its weight.

In the net, a layer ``name`` becomes an ``nn.Sequential`` of ``name.0``, ``name.1`` and so on, without norms or
activations between them. Each thin convolution takes the layer's stride, padding and dilation along the axes that its
own kernel covers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.compression.low_rank.factors import Kind, Ranks, factors_of, largest_ranks
from project.models.surgery import register_surgery

Layer = nn.Conv2d | nn.Linear
Axes = tuple[int, ...]

_AXES: dict[Kind, tuple[Axes, ...]] = {"svd": ((0, 1), ()), "spatial": ((0,), (1,)), "tucker": ((), (0, 1), ())}
"""For each kind, the axes of each factor: 0 if it has the layer's kernel height, 1 if it has the kernel width."""


@register_surgery
@dataclass(frozen=True)
class Factorize:
    """Replaces some layers by thin layers, with the factors of the present weights.

    Example::

        >>> from torch import nn
        >>> from project.compression import Factorize
        >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        >>> Factorize(kinds={"2": "spatial"}, ranks={"2": [8]}).apply_(net)
        >>> [tuple(layer.weight.shape) for layer in net[2]]
        [(8, 32, 3, 1), (32, 8, 1, 3)]

    Args:
        kinds: the kind of factors of each layer, as in :mod:`project.compression.low_rank.factors`.
        ranks: the ranks of each layer, 1 or more: one number, or for ``tucker`` two numbers (in, out).
    """

    kinds: dict[str, Kind]
    ranks: dict[str, list[int]]

    def apply_(self, net: nn.Module) -> None:
        """Replace the layers of a net, in place.

        Args:
            net: the net that the plan was made for, or a fresh net with the same arguments.

        Raises:
            ValueError: if a layer is missing or too small; the net is then unchanged.
        """
        thin = {name: self._thin(net, name) for name in self.kinds}
        for name, layers in thin.items():
            net.set_submodule(name, layers)

    def _thin(self, net: nn.Module, name: str) -> nn.Sequential:
        """The thin layers that replace the layer ``name``."""
        kind, ranks = self.kinds[name], tuple(self.ranks[name])
        layer = dict(net.named_modules()).get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            raise ValueError(
                f"{type(net).__name__} has no convolution or linear layer {name}: factorize the net that the plan was "
                "made for, and factorize it once."
            )
        largest = largest_ranks(layer.weight, kind)
        if any(rank > most for rank, most in zip(ranks, largest, strict=True)):
            raise ValueError(
                f"{name} is to get the ranks {list(ranks)}, but has {list(largest)} at most: factorize a net with the "
                "arguments of the net that the plan was made for."
            )
        return thin_layers(layer, kind, ranks)


@torch.no_grad()
def thin_layers(layer: Layer, kind: Kind, ranks: Ranks) -> nn.Sequential:
    """The thin layers that replace a layer. The last one has the layer's bias, and the others have none."""
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
    """A convolution with this weight, and with the stride, padding and dilation of ``layer`` along ``axes`` only."""
    conv = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        _along(layer.stride, axes, 1),
        layer.padding if isinstance(layer.padding, str) else _along(layer.padding, axes, 0),
        _along(layer.dilation, axes, 1),
        bias=False,
        padding_mode=layer.padding_mode,
        device="meta",  # no memory and no random number for a weight that is replaced in the next lines
    )
    channels_last = not layer.weight.is_contiguous()
    order = torch.channels_last if channels_last else torch.contiguous_format
    conv.weight = nn.Parameter(weight.contiguous(memory_format=order))
    return conv


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight and without a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous())
    return linear


def _along(values: tuple[int, ...], axes: Axes, otherwise: int) -> tuple[int, int]:
    """The values for height and width along ``axes``, and ``otherwise`` along the other axes."""
    return (values[0] if 0 in axes else otherwise, values[1] if 1 in axes else otherwise)
