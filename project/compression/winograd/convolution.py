"""Winograd's minimal filtering: a 3x3 convolution in fewer multiplications, of the same weights.

Lavin & Gray 2016, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308, sec. 4): a tile of ``m x m``
outputs needs a tile ``d`` of ``(m + 2) x (m + 2)`` inputs, and is

    Y = A^T [(G g G^T) . (B^T d B)] A        (eq. 8)

with ``.`` the product of entries: ``(m + 2)^2`` multiplications for each pair of channels instead of ``9 m^2``. Summed
over the input channels before ``A`` is applied (eq. 12), they are ``(m + 2)^2`` matrix products (eq. 13). F(2x2, 3x3)
takes 16 instead of 36 multiplications, 2.25 times fewer, F(4x4, 3x3) 36 instead of 144, 4 times fewer, where tiles
divide the map: see :func:`count_multiplications`.

The result differs from direct convolution by rounding alone. Transforms add up numbers of both signs, multiplied by up
to 8, while the sums over channels are of fewer terms. On ReLU maps of 8 to 448 channels the error of float32 against
float64, in the root mean square, is 0.7 to 1.1 times that of direct convolution for F(2x2, 3x3) and 4 to 6 times for
F(4x4, 3x3); of one channel 1.8 and 6 to 10 times (``scripts/benchmark_winograd.py errors``).

Which layers gain by it, and on which tiles, is measured: :mod:`project.compression.winograd.choice`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from project.models.kernels import can_run_winograd, count_tiles, pack_panels, same_bits, winograd
from project.models.surgery import register_surgery

TILES = (2, 4)
"""Sides of a tile of the output."""

Matrix = list[list[float]]

MATRICES: dict[int, tuple[Matrix, Matrix, Matrix]] = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}
"""By the tile's side: ``B^T``, ``G`` and ``A^T`` (sec. 4.1 to 4.3)."""


def transform(x: Tensor, matrix: Matrix, dims: tuple[int, int]) -> Tensor:
    """``matrix x matrix^T`` along two dimensions: sums, not matrix products, and so they are counted as none."""
    for dim in dims:
        parts = x.unbind(dim)
        x = torch.stack([sum(c * part for c, part in zip(row, parts, strict=True) if c) for row in matrix], dim)  # type: ignore[misc]
    return x


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """``G g G^T`` of a weight ``[K, C, 3, 3]``, as ``[tile + 2, tile + 2, C, K]``; rounded once, at the end."""
    return transform(weight.double(), MATRICES[tile][1], (2, 3)).to(weight.dtype).permute(2, 3, 1, 0).contiguous()


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], tile: int) -> Tensor:
    """Convolution with stride 1 by F(tile x tile, 3x3), step by step, in any type and on any device.

    It is what the kernel of :mod:`project.models.kernels.winograd` is compared with; it gains no time.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C, 3, 3]``.
        bias: ``[K]``.
        padding: zeros above and below, left and right.
        tile: 2 or 4.
    """
    inputs, _, outputs = MATRICES[tile]
    height, width = (side + 2 * pad - 2 for side, pad in zip(x.shape[2:], padding, strict=True))
    down, across = count_tiles(height, tile), count_tiles(width, tile)
    right, below = across * tile - width + padding[1], down * tile - height + padding[0]
    padded = nn.functional.pad(x, (padding[1], right, padding[0], below))
    d = padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)  # [N, C, down, across, tile + 2, tile + 2]
    v = transform(d, inputs, (4, 5)).permute(4, 5, 0, 2, 3, 1)
    m = v.flatten(2, 4) @ transform_weight(weight, tile)  # (tile + 2)^2 matrix products
    m = transform(m, outputs, (0, 1)).unflatten(2, (len(x), down, across))  # [tile, tile, N, down, across, K]
    y = m.permute(2, 5, 3, 0, 4, 1).flatten(4, 5).flatten(2, 3)[..., :height, :width]
    return y if bias is None else y + bias[:, None, None]


def count_multiplications(
    out_height: int, out_width: int, in_channels: int, out_channels: int, tile: int | None
) -> int:
    """Multiplications of a 3x3 convolution of one image; those of the transforms, by constants, are not counted.

    A tile that reaches beyond the map costs as much as a whole one: of 14x14 pixels F(4x4, 3x3) makes 16 tiles, and
    multiplies 3.06 times less, not 4.

    Args:
        out_height, out_width: of the output.
        in_channels, out_channels: of the weight.
        tile: side of a tile of the output; ``None`` is direct convolution.
    """
    if tile is None:
        return out_height * out_width * 9 * in_channels * out_channels
    tiles = count_tiles(out_height, tile) * count_tiles(out_width, tile)
    return tiles * (tile + 2) ** 2 * in_channels * out_channels


class _Kept(NamedTuple):
    """A transformed weight, and the weight that it was made of."""

    weight: Tensor
    panels: Tensor


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 that computes by F(tile x tile, 3x3) where that is fast: in float32, channels-last,
    on a CPU, without gradients; elsewhere, in training, exported or compiled, it is ``nn.Conv2d``, whose state it has.

    The weight is transformed once. Each call compares it bit by bit with the one that was transformed, so that no other
    is ever computed with, however it changed (a view of its memory, ``weight.data``, leaves no other trace).

    Limit: where an input is infinite or not a number, so is its whole tile.
    """

    tile: int
    padding: tuple[int, int]
    _kept: _Kept | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d, tile: int) -> "WinogradConv2d":
        """A layer that shares the parameters of ``conv``.

        Raises:
            ValueError: for a convolution that :func:`why_not_winograd` has a reason against, and another tile.
        """
        if reason := why_not_winograd(conv):
            raise ValueError(f"the convolution {conv} has no Winograd form: {reason}.")
        if tile not in TILES:
            raise ValueError(f"tile is {tile}, but there are F(2x2, 3x3) and F(4x4, 3x3): choose 2 or 4.")
        channels, padding = (conv.in_channels, conv.out_channels), _padding(conv)
        layer = cls(*channels, 3, padding=padding, bias=conv.bias is not None, device="meta")  # draws no numbers
        layer.weight, layer.bias, layer.tile = conv.weight, conv.bias, tile
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        padding = _padding(self)
        if self.training or why_not_winograd(self) or not can_run_winograd(input, self.weight, self.bias, padding):
            return super().forward(input)
        return winograd(input, self._panels(), self.bias, len(self.weight), self.tile, padding)

    def _panels(self) -> Tensor:
        kept = self._kept
        if kept is None or not same_bits(kept.weight, self.weight):
            weight = self.weight.detach().clone()
            self._kept = kept = _Kept(weight, pack_panels(transform_weight(weight, self.tile)))
        return kept.panels

    def __getstate__(self) -> dict[str, Any]:
        """Copies transform for themselves."""
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tile={self.tile}"


def why_not_winograd(layer: nn.Conv2d) -> str | None:
    """Why a convolution has no Winograd form; ``None`` where it has one."""
    if layer.kernel_size != (3, 3):
        return f"its kernel is {layer.kernel_size[0]}x{layer.kernel_size[1]}, not 3x3"
    if layer.stride != (1, 1) or layer.dilation != (1, 1):
        return "it has a stride or a dilation"
    if layer.groups != 1:
        return f"its channels are in {layer.groups} groups"
    if layer.padding_mode != "zeros":
        return f"its padding is {layer.padding_mode}, not zeros"
    return None


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer.padding, str):
        return (1, 1) if layer.padding == "same" else (0, 0)
    return (layer.padding[0], layer.padding[1])


@register_surgery
@dataclass(frozen=True)
class Winograd:
    """Compute these convolutions by Winograd's algorithm, and all others directly.

    Args:
        tiles: side of a tile of the output by layer, 2 or 4.
    """

    tiles: dict[str, int]

    def apply_(self, net: nn.Module) -> None:
        """Exchange the layers of ``net`` in place; parameters and their names stay.

        Raises:
            ValueError: when ``net`` lacks a layer or one has no Winograd form; ``net`` is then as it was.
        """
        layers = dict(net.named_modules())
        for name in self.tiles:
            if not isinstance(layers.get(name), nn.Conv2d) or not name:
                raise ValueError(
                    f"{type(net).__name__} has no convolution {name}: give the net that the tiles were chosen for."
                )
        fast = {name: WinogradConv2d.of(layers[name], tile) for name, tile in self.tiles.items()}
        plain = {name: _plain(layer) for name, layer in layers.items() if isinstance(layer, WinogradConv2d)}
        for name, layer in {**plain, **fast}.items():
            net.set_submodule(name, layer)


def _plain(layer: WinogradConv2d) -> nn.Conv2d:
    channels, bias = (layer.in_channels, layer.out_channels), layer.bias is not None
    conv = nn.Conv2d(*channels, 3, padding=_padding(layer), bias=bias, device="meta")
    conv.weight, conv.bias = layer.weight, layer.bias
    return conv.train(layer.training)
