"""The plain layers that stand for one: the factors of its weight, with its stride, padding and dilation divided up."""

import torch
from torch import Tensor, nn

from project.compression.factors import Kind, Ranks, factors_of

Layer = nn.Conv2d | nn.Linear
Axes = tuple[int, ...]

_AXES: dict[Kind, tuple[Axes, ...]] = {"svd": ((0, 1), ()), "spatial": ((0,), (1,)), "tucker": ((), (0, 1), ())}
"""Along which of height and width each factor acts."""


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
