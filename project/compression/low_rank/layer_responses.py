"""What layers see: how many pixels they run over, and the second moment of what they answer.

The second moment of a layer's responses is what Zhang et al. 2015 (arXiv:1505.06798, eq. 4) take the principal
directions of. Ours: it is not centred, so that the mean is kept too.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.compression.low_rank.factors import Kind, Ranks, kernel_of, matrix_of
from project.compression.low_rank.thin_layers import Axes, thin_conv
from project.metrics.complexity import count_macs

_CHUNK = 64


@dataclass
class Positions:
    """Pixels that a layer runs over for one image, summed over its calls: of its input, of its output, and of a map as
    high as the output and as wide as the input, which is what ``spatial`` has in between.
    """

    inputs: int = 0
    outputs: int = 0
    between: int = 0

    def macs(self, weight: Tensor, kind: Kind | None, ranks: Ranks = ()) -> int:
        """Multiply-accumulates of the factors, or without a kind of the layer as it is."""
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
    """Of every convolution and linear layer that runs."""
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
    """Sums of products of the responses ``[rows, rows]``, float64, of the rows of
    :func:`~project.compression.low_rank.factors.matrix_of`.

    Args:
        net: in eval mode.
        wanted: kinds by layer.
        images: ``[N, C, H, W]`` as the net takes them.
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
    """``[positions, rows]``, without the bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, layer.weight).flatten(0, -2)
    assert isinstance(layer, nn.Conv2d)
    weight: Tensor = layer.weight
    axes: Axes = (0, 1)
    if kind == "spatial":
        weight = matrix_of(weight, kind).to(weight).view(-1, weight.shape[1], weight.shape[2], 1)
        axes = (0,)
    return thin_conv(layer, weight, axes)(inputs).movedim(1, -1).flatten(0, -2)
