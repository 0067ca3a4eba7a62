"""Measurements in a running net: the number of pixels of each layer, and the second moment of its responses.

Zhang et al. 2015 (arXiv:1505.06798, eq. 4) take the principal directions of the second moment of a layer's responses.
Our deviation: the mean is not subtracted, so that the factors keep the mean too.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.compression.low_rank.factors import Kind, Ranks, kernel_of, matrix_of
from project.compression.low_rank.thin_layers import Axes, thin_conv
from project.metrics.complexity import count_macs

_CHUNK = 64  # number of images that run at once


@dataclass
class Positions:
    """Number of pixels that a layer computes for one image, summed over its calls.

    Args:
        inputs: number of pixels of the input, 0 or more.
        outputs: number of pixels of the output, 0 or more. A linear layer has one for each vector.
        between: number of pixels of a map with the output's height and the input's width, 0 or more. ``spatial`` has
            such a map between its two layers.
    """

    inputs: int = 0
    outputs: int = 0
    between: int = 0

    def macs(self, weight: Tensor, kind: Kind | None, ranks: Ranks = ()) -> int:
        """Multiply-accumulates of the factors for one image; if ``kind`` is ``None``, those of the layer as it is."""
        out_channels, in_channels = weight.shape[:2]
        height, width = kernel_of(weight)
        if kind is None:
            return self.outputs * out_channels * in_channels * height * width
        if kind == "svd":
            return self.outputs * ranks[0] * (in_channels * height * width + out_channels)
        if kind == "spatial":
            return ranks[0] * (self.between * in_channels * height + self.outputs * out_channels * width)
        rank_in, rank_out = ranks
        core = rank_out * (rank_in * height * width + out_channels)
        return self.inputs * in_channels * rank_in + self.outputs * core


def positions_of(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Positions]:
    """The number of pixels of every convolution and linear layer that runs, by the layer's name."""
    positions: dict[str, Positions] = defaultdict(Positions)

    def note(name: str, image: Tensor, output: Tensor, is_conv: bool) -> None:
        own = positions[name]
        if is_conv:
            own.inputs += image.shape[2] * image.shape[3]
            own.outputs += output.shape[2] * output.shape[3]
            own.between += output.shape[2] * image.shape[3]
        else:
            own.outputs += output.numel() // output.shape[-1]

    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: note(name, args[0], output, isinstance(module, nn.Conv2d))
        )
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        count_macs(net, image_shape)
    finally:
        for handle in handles:
            handle.remove()
    return dict(positions)


@torch.no_grad()
def second_moments(net: nn.Module, wanted: Mapping[str, set[Kind]], images: Tensor) -> dict[tuple[str, Kind], Tensor]:
    """Second moments of the responses of :func:`~project.compression.low_rank.factors.matrix_of`, for layer and kind.

    Each is a sum over images and pixels, not divided by their number, ``[rows, rows]`` in float64.

    Args:
        net: a net in eval mode.
        wanted: the kinds of factors for which the responses are measured, for each layer.
        images: normalised images ``[N, C, H, W]``.
    """
    sums: dict[tuple[str, Kind], Tensor] = {}

    def add(name: str, layer: nn.Module, inputs: Tensor) -> None:
        for kind in wanted[name]:
            rows = _responses(layer, kind, inputs).double()
            moment = rows.T @ rows
            sums[name, kind] = sums[name, kind] + moment if (name, kind) in sums else moment

    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda layer, args, name=name: add(name, layer, args[0]))
        for name in wanted
    ]
    try:
        for chunk in images.split(_CHUNK):
            net(chunk)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _responses(layer: nn.Module, kind: Kind, inputs: Tensor) -> Tensor:
    """The responses ``[positions, rows]`` of the rows of ``matrix_of``, without the bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, layer.weight).flatten(0, -2)
    assert isinstance(layer, nn.Conv2d)
    weight: Tensor = layer.weight
    axes: Axes = (0, 1)
    if kind == "spatial":  # each row is a k x 1 kernel: [out * kw, in, kh, 1]
        weight = matrix_of(weight, kind).to(weight).view(-1, weight.shape[1], weight.shape[2], 1)
        axes = (0,)
    return thin_conv(layer, weight, axes)(inputs).movedim(1, -1).flatten(0, -2)
