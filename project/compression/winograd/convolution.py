"""Winograd's minimal filtering: a 3x3 convolution with the same weights and fewer multiplications.

Lavin & Gray 2016, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308, sec. 4). F(m x m, 3x3) computes
a tile ``Y`` of ``m x m`` outputs from a tile ``d`` of ``(m + 2) x (m + 2)`` inputs and the 3x3 weights ``g``:

    Y = A^T [(G g G^T) . (B^T d B)] A        (eq. 8)

Here ``.`` multiplies entry by entry. That takes ``(m + 2)^2`` multiplications for each pair of an input and an output
channel, where direct convolution takes ``9 m^2``. The products are summed over the input channels before ``A`` is
applied (eq. 12), so they form ``(m + 2)^2`` matrix products (eq. 13). F(2x2, 3x3) takes 16 multiplications instead of
36, which is 2.25 times fewer. F(4x4, 3x3) takes 36 instead of 144, which is 4 times fewer. These factors hold if the
tiles divide the output evenly: see :func:`count_multiplications`.

The result differs from direct convolution only by rounding. The transforms add numbers of both signs, multiplied by up
to 8, which adds error. The sums over the channels have fewer terms, which removes error. With ReLU inputs of 8 to 448
channels, the root mean square error of float32 against float64 is 0.7 to 1.1 times that of direct convolution for
F(2x2, 3x3) and 4 to 6 times for F(4x4, 3x3). With one channel it is 1.8 times and 6 to 10 times
(``scripts/benchmark_winograd.py errors``).

:mod:`project.compression.winograd.choice` measures which layers become faster, and with which tiles.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from project.compression.plain_layers import computes_as_plain, is_plain
from project.models.kernels import can_run_winograd, count_tiles, pack_panels, same_bits, winograd
from project.models.surgery import register_surgery

TILES = (2, 4)
"""Possible sides of an output tile: ``tile`` in the code, m in the equations."""

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
"""The transforms ``B^T`` of the inputs, ``G`` of the weights and ``A^T`` of the products, by m (sec. 4.1 to 4.3).

With m outputs on a side, their shapes are ``[m + 2, m + 2]``, ``[m + 2, 3]`` and ``[m, m + 2]``.
"""


def transform(x: Tensor, matrix: Matrix, dims: tuple[int, int]) -> Tensor:
    """``matrix x matrix^T`` along two dimensions of ``x``.

    It is written as sums, not as matrix products, so that counters of multiplications do not count it.

    Args:
        x: tensor whose two dimensions ``dims`` have as many entries as ``matrix`` has columns.
        matrix: constant matrix, as a list of rows.
        dims: two dimensions of ``x`` to transform. Afterwards they have as many entries as ``matrix`` has rows.
    """
    for dim in dims:  # one dimension at a time, which is the product from the left and then from the right
        parts = x.unbind(dim)
        x = torch.stack([sum(c * part for c, part in zip(row, parts, strict=True) if c) for row in matrix], dim)  # type: ignore[misc]
    return x


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """``G g G^T`` as ``[tile + 2, tile + 2, C, K]``, computed in float64 and rounded once at the end.

    Args:
        weight: weight ``[K, C, 3, 3]`` of a convolution.
        tile: side of an output tile, 2 or 4.
    """
    return transform(weight.double(), MATRICES[tile][1], (2, 3)).to(weight.dtype).permute(2, 3, 1, 0).contiguous()


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], tile: int) -> Tensor:
    """Convolution with stride 1 by F(tile x tile, 3x3), step by step, for any dtype and device.

    It is the reference for the kernel of :mod:`project.models.kernels.winograd`, and it is not fast itself.

    Args:
        x: inputs ``[N, C, H, W]``.
        weight: weight ``[K, C, 3, 3]``.
        bias: bias ``[K]``, or None for no bias.
        padding: number of zeros on each side: first above and below, then left and right; each 0 or more.
        tile: side of an output tile, 2 or 4.
    """
    inputs, _, outputs = MATRICES[tile]  # B^T and A^T
    height, width = (side + 2 * pad - 2 for side, pad in zip(x.shape[2:], padding, strict=True))
    down, across = count_tiles(height, tile), count_tiles(width, tile)
    # Zeros at the right and below fill the last tiles up to whole ones.
    right, below = across * tile - width + padding[1], down * tile - height + padding[0]
    padded = nn.functional.pad(x, (padding[1], right, padding[0], below))
    # Input tiles start every ``tile`` pixels and overlap by two.
    d = padded.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)  # [N, C, down, across, tile + 2, tile + 2]
    v = transform(d, inputs, (4, 5)).permute(4, 5, 0, 2, 3, 1)  # B^T d B: [tile + 2, tile + 2, N, down, across, C]
    m = v.flatten(2, 4) @ transform_weight(weight, tile)  # eq. 13: (tile + 2)^2 matrix products [tiles, C] x [C, K]
    m = transform(m, outputs, (0, 1)).unflatten(2, (len(x), down, across))  # A^T m A: [tile, tile, N, down, across, K]
    # [N, K, down, tile, across, tile], then the tiles side by side, without the rows and columns beyond the output.
    y = m.permute(2, 5, 3, 0, 4, 1).flatten(4, 5).flatten(2, 3)[..., :height, :width]
    return y if bias is None else y + bias[:, None, None]


def count_multiplications(
    out_height: int, out_width: int, in_channels: int, out_channels: int, tile: int | None
) -> int:
    """The number of multiplications of a 3x3 convolution for one image.

    Multiplications by the constants of the transforms are not counted. A tile that reaches beyond the output costs as
    much as a whole one. For 14x14 pixels, F(4x4, 3x3) needs 16 tiles, and so 3.06 times fewer multiplications, not 4.

    Args:
        out_height: height of the output in pixels, 1 or more.
        out_width: width of the output in pixels, 1 or more.
        in_channels: number of input channels of the convolution, 1 or more.
        out_channels: number of output channels of the convolution, 1 or more.
        tile: side of an output tile, 2 or 4; None means direct convolution.
    """
    if tile is None:
        return out_height * out_width * 9 * in_channels * out_channels
    tiles = count_tiles(out_height, tile) * count_tiles(out_width, tile)
    return tiles * (tile + 2) ** 2 * in_channels * out_channels


class _Kept(NamedTuple):
    """A transformed weight in the kernel's order (``panels``), and a copy of the weight that it was computed from."""

    weight: Tensor
    panels: Tensor


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 that uses F(tile x tile, 3x3) in float32 inference on a CPU.

    It uses Winograd's algorithm for channels-last maps without gradients. In all other cases, such as in training, in
    export and when compiled, it computes as ``nn.Conv2d``, and it has the same state dict.

    The weight is transformed once and the result is kept. Each call compares the weight bit by bit with the one that
    was transformed, so a changed weight is never missed. (A change through ``weight.data`` leaves no other trace.)

    Limit: if an input is infinite or NaN, the whole output tile is infinite or NaN.

    Example::

        >>> import torch
        >>> from project.compression import WinogradConv2d
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1).eval()
        >>> x = torch.randn(2, 8, 14, 14).contiguous(memory_format=torch.channels_last)
        >>> with torch.inference_mode():
        ...     difference = WinogradConv2d.of(conv, 4)(x) - conv(x)
        >>> bool(difference.abs().max() < 1e-4)
        True
    """

    computes_as = nn.Conv2d
    tile: int
    padding: tuple[int, int]
    _kept: _Kept | None = None

    @classmethod
    def of(cls, conv: nn.Conv2d, tile: int) -> "WinogradConv2d":
        """A Winograd layer with the parameters of a convolution; both layers share them.

        Args:
            conv: convolution of 3x3 with stride 1, no dilation, one group and zero padding; it is not changed.
            tile: side of an output tile, 2 or 4.

        Raises:
            ValueError: if the convolution has no Winograd form (:func:`why_not_winograd`), or if ``tile`` is not 2 or
                4.
        """
        if reason := why_not_winograd(conv) or (None if is_plain(conv) else "its weight is computed"):
            raise ValueError(f"the convolution {conv} has no Winograd form: {reason}.")
        if tile not in TILES:
            raise ValueError(f"tile is {tile}, but there are F(2x2, 3x3) and F(4x4, 3x3): choose 2 or 4.")
        channels, padding = (conv.in_channels, conv.out_channels), _padding(conv)
        layer = cls(*channels, 3, padding=padding, bias=conv.bias is not None, device="meta")  # no random numbers
        layer.weight, layer.bias, layer.tile = conv.weight, conv.bias, tile
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        padding = _padding(self)
        if self.training or why_not_winograd(self) or not can_run_winograd(input, self.weight, self.bias, padding):
            return super().forward(input)
        return winograd(input, self._panels(), self.bias, len(self.weight), self.tile, padding)

    def _panels(self) -> Tensor:
        """The transformed weight in the kernel's order; computed again only if the weight has changed."""
        kept = self._kept
        if kept is None or not same_bits(kept.weight, self.weight):
            weight = self.weight.detach().clone()
            self._kept = kept = _Kept(weight, pack_panels(transform_weight(weight, self.tile)))
        return kept.panels

    def __getstate__(self) -> dict[str, Any]:
        """The state without the transformed weight: a copy or a pickled layer transforms its own weight again."""
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tile={self.tile}"


def why_not_winograd(layer: nn.Conv2d) -> str | None:
    """The reason why a convolution has no Winograd form; None if it has one.

    Args:
        layer: convolution to check; it is not changed.
    """
    if not computes_as_plain(layer):
        return f"it is a {type(layer).__name__}, which may use its weight in another way"
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
    """The zeros on each side of a 3x3 convolution with stride 1, also for the padding ``same`` and ``valid``."""
    if isinstance(layer.padding, str):
        return (1, 1) if layer.padding == "same" else (0, 0)
    return (layer.padding[0], layer.padding[1])


@register_surgery
@dataclass(frozen=True)
class Winograd:
    """Surgery that lets the named convolutions use Winograd's algorithm, and all others direct convolution.

    Example::

        >>> import torch
        >>> from project.compression import Winograd
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> Winograd({"2": 4}).apply_(net)
        >>> [type(layer).__name__ for layer in net]
        ['Conv2d', 'ReLU', 'WinogradConv2d']

    Args:
        tiles: side of an output tile, 2 or 4, by the layer's name.
    """

    tiles: dict[str, int]

    def apply_(self, net: nn.Module) -> None:
        """Replace the layers in place; the parameters and their names do not change.

        Args:
            net: net with all layers of ``tiles``.

        Raises:
            ValueError: if the net lacks a layer, or if a layer has no Winograd form. The net is not changed then.
        """
        layers = dict(net.named_modules())
        for name in self.tiles:
            if not isinstance(layers.get(name), nn.Conv2d) or not is_plain(layers[name]) or not name:
                raise ValueError(
                    f"{type(net).__name__} has no convolution {name}: give the net that the tiles were chosen for."
                )
        # All new layers are made before the first one is set, so that an error leaves the net unchanged.
        fast = {name: WinogradConv2d.of(layers[name], tile) for name, tile in self.tiles.items()}
        plain = {name: _plain(layer) for name, layer in layers.items() if isinstance(layer, WinogradConv2d)}
        for name, layer in {**plain, **fast}.items():
            net.set_submodule(name, layer)


def _plain(layer: WinogradConv2d) -> nn.Conv2d:
    """An ordinary convolution with the parameters of a Winograd layer."""
    channels, bias = (layer.in_channels, layer.out_channels), layer.bias is not None
    conv = nn.Conv2d(*channels, 3, padding=_padding(layer), bias=bias, device="meta")
    conv.weight, conv.bias = layer.weight, layer.bias
    return conv.train(layer.training)
