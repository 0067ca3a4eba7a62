"""Small nets whose units are coupled in one way each. They map images [N, 3, 8, 8] to 5 logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers.subclasses import SamePad, StandardConv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

SHAPE = (3, 8, 8)


class Do(nn.Module):
    """Layers and a function ``(self, x)`` that uses them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def around(block: nn.Module, out: int = 8, width: int = 8) -> nn.Module:
    """A stem of ``width`` channels, a block, and a head that reads the mean over pixels of ``out`` channels."""
    return Do(
        lambda m, x: m.head(m.block(m.stem(x).relu()).relu().flatten(2).mean(2)),
        stem=nn.Conv2d(3, width, 3, padding=1),
        block=block,
        head=nn.Linear(out, 5),
    )


def between(function: Callable[[Tensor], Tensor], out: int = 8) -> nn.Module:
    """Something between the stem and a convolution."""
    layers = {"norm": function} if isinstance(function, nn.Module) else {}
    return around(Do(lambda m, x: m.conv(function(x) if not layers else m.norm(x)), conv=conv(out, 6), **layers), 6)


def on_tokens(block: nn.Module, out: int = 8, width: int = 8) -> nn.Module:
    """A stem, a block that takes tokens [N, L, C], and a head that reads their mean."""
    return Do(
        lambda m, x: m.head(m.block(m.stem(x).flatten(2).transpose(1, 2)).mean(1)),
        stem=nn.Conv2d(3, width, 4, 4),
        block=block,
        head=nn.Linear(out, 5),
    )


def conv(num_in: int, num_out: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, size, padding=size // 2, **options)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


class Standardised(nn.Conv2d):
    """Standardises each filter by torch's batch norm, as timm's layer does."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.view(1, len(self.weight), -1), None, None, training=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class RMSNorm2d(nn.Module):
    """Divides each pixel by the root mean square of its channels, computed by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class Heads(nn.Module):
    """Attention with one layer for queries, keys and values, as in timm, or with three."""

    def __init__(self, width: int = 12, num_heads: int = 3, together: bool = True, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = num_heads, width // num_heads, fused
        if together:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                layer(x).view(n, length, self.num_heads, self.head_dim).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, -1))


class WideHeads(nn.Module):
    """Attention that reads the width of a head from its input, and gives tokens of this width."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        heads = self.qkv(x).reshape(n, length, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads.unbind(0))
        return x + self.proj(y.transpose(1, 2).reshape(n, length, c))


def attention(
    batch_first: bool = True, need_weights: bool = False, cross: bool = False, num_heads: int = 3, **options: Any
) -> nn.Module:
    """Torch's attention on tokens [N, L, C] or [L, N, C], with a residual connection."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        y = m.norm(x)
        z = m.other(x) if cross else y
        x = x + m.attend(y, z, z, need_weights=need_weights)[0]
        return x if batch_first else x.transpose(0, 1)

    attend = nn.MultiheadAttention(12, num_heads, batch_first=batch_first, **options)
    other = {"other": nn.Linear(12, options.get("kdim", 12))} if cross else {}
    return Do(forward, norm=nn.LayerNorm(12), attend=attend, **other)


def vit() -> nn.Module:
    """A class token, positions, two blocks of attention and MLP with a residual stream, and a norm."""

    def forward(m: Any, images: Tensor) -> Tensor:
        x = m.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.positions
        for norm1, heads, norm2, wide, back in m.blocks:
            x = x + heads(norm1(x))
            x = x + back(F.gelu(wide(norm2(x))))
        return m.head(m.norm(x)[:, 0])

    def block() -> nn.ModuleList:
        return nn.ModuleList([nn.LayerNorm(12), Heads(), nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)])

    return Do(
        forward,
        stem=nn.Conv2d(3, 12, 4, 4),
        token=parameter(1, 1, 12),
        positions=parameter(1, 5, 12),
        blocks=nn.ModuleList([block(), block()]),
        norm=nn.LayerNorm(12),
        head=nn.Linear(12, 5),
    )


def tied() -> nn.Module:
    """Two convolutions with one weight."""
    block = Do(lambda m, x: m.b(m.a(x).relu()), a=conv(8, 8), b=conv(8, 8))
    block.b.weight = block.a.weight
    return around(block)


def shuffle(x: Tensor) -> Tensor:
    """A channel shuffle by views."""
    n, channels, height, width = x.shape
    return x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


def fold(x: Tensor) -> Tensor:
    """Pixels become channels by views (space to depth)."""
    n, channels, height, width = x.shape
    x = x.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(n, 4 * channels, height // 2, width // 2)


@torch.library.custom_op("tests_of_units::triple", mutates_args=())
def triple(x: Tensor) -> Tensor:
    """An operation that nobody knows."""
    return 3 * x


triple.register_fake(torch.empty_like)
triple.register_autograd(lambda context, grad: 3 * grad)


class Row(NamedTuple):
    """A net, and the layers whose units stay, beside the head."""

    make: Callable[[], nn.Module]
    stays: frozenset[str] = frozenset()


# fmt: off
def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def row(name: str, make: Callable[[], nn.Module], *stays: str) -> None:
        rows[name] = Row(make, frozenset(stays))

    # convolutions
    row("depthwise", lambda: around(nn.Sequential(conv(8, 8, groups=8), nn.ReLU(), conv(8, 6, 1)), 6))
    row("depthwise times 2", lambda: around(nn.Sequential(conv(8, 16, groups=8), nn.ReLU(), conv(16, 6, 1)), 6))
    row("grouped", lambda: around(nn.Sequential(conv(8, 12, groups=4), nn.ReLU(), conv(12, 6, 1)), 6))
    row("grouped twice", lambda: around(nn.Sequential(conv(8, 12, groups=4), nn.ReLU(), conv(12, 6, groups=2)), 6))
    row("transposed", lambda: around(nn.ConvTranspose2d(8, 6, 2, 2), 6))
    row("grouped transposed", lambda: around(nn.Sequential(
        nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ReLU(), conv(6, 8))), "stem", "block.0")
    row("1-d", lambda: around(nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Conv1d(6, 8, 3))))
    row("3-d", lambda: around(Do(lambda m, x: m.conv(x.unflatten(2, (2, -1))), conv=nn.Conv3d(8, 6, (2, 3, 3))), 6))
    row("padded as in TensorFlow", lambda: around(SamePad(8, 6, 2), 6))
    row("standardised weight", lambda: around(nn.Sequential(Standardised(8, 6, 3), nn.ReLU(), Standardised(6, 8, 3))))
    row("standardised by hand", lambda: around(nn.Sequential(StandardConv(8, 6, 3), nn.ReLU(), StandardConv(6, 8, 3))))
    row("weight norm", lambda: around(nn.Sequential(
        parametrizations.weight_norm(conv(8, 6)), nn.ReLU(), conv(6, 8))), "stem", "block.0")

    # norms
    row("norm without scale", lambda: between(nn.BatchNorm2d(8, affine=False)))
    row("dense", lambda: around(Do(
        lambda m, x: m.last(m.norm2(torch.cat([x, y := m.conv1(m.norm1(x).relu()), m.conv2(y)], 1)).relu()),
        norm1=nn.BatchNorm2d(8), conv1=conv(8, 4), conv2=conv(4, 6), norm2=nn.BatchNorm2d(18), last=conv(18, 8))))
    row("pre-activation", lambda: around(Do(
        lambda m, x: m.norm3(x + m.conv2(m.norm2(m.conv1(m.norm1(x).relu())).relu())),
        norm1=nn.BatchNorm2d(8), conv1=conv(8, 6), norm2=nn.BatchNorm2d(6), conv2=conv(6, 8), norm3=nn.BatchNorm2d(8))))
    row("layer norm of tokens", lambda: on_tokens(nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 12), nn.LayerNorm(12)), 12))
    row("layer norm of pixels", lambda: between(Do(
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(8))))
    row("layer norm of images", lambda: between(nn.LayerNorm((8, 8, 8))))
    row("layer norm without scale", lambda: on_tokens(nn.Sequential(nn.LayerNorm(8, elementwise_affine=False))))
    row("group norm, one channel", lambda: between(nn.GroupNorm(8, 8)))
    row("group norm, two channels", lambda: between(nn.GroupNorm(4, 8)))
    row("group norm, one group", lambda: between(nn.GroupNorm(1, 8)))
    row("group norm of a sum", lambda: between(Do(
        lambda m, x: m.norm(x + m.conv(x)), norm=nn.GroupNorm(2, 8), conv=conv(8, 8))))
    row("RMS norm", lambda: on_tokens(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 12), nn.RMSNorm(12)), 12))
    row("RMS norm by hand", lambda: between(RMSNorm2d()))
    row("global response norm", lambda: between(Do(
        lambda m, x: x * m.gamma * (y := x.norm(2, (2, 3), True)) / (y.mean(1, keepdim=True) + 0.1),
        gamma=parameter(8, 1, 1))))  # fmt: skip
    row("mean and maximum of all channels", lambda: around(Do(
        lambda m, x: x * m.conv(torch.stack([x.mean(1), x.amax(1)], 1)).sigmoid(), conv=conv(2, 1))), "block.conv")
    row("without the mean of channels", lambda: between(lambda x: x - x.mean(dim=-3, keepdim=True)))
    row("without the sum of all", lambda: between(lambda x: x - 0.01 * x.flatten(1).sum(1)[:, None, None, None]))
    row("variance over channels and pixels", lambda: between(lambda x: x / (1 + x.var((1, 2, 3), keepdim=True))))
    row("local response norm", lambda: between(nn.LocalResponseNorm(3, 0.1)))
    row("instance norm", lambda: between(nn.InstanceNorm2d(8)))
    row("instance norm with scale", lambda: between(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)))

    # numbers for each channel
    row("PReLU", lambda: between(nn.PReLU(8)))
    row("PReLU with one slope", lambda: between(nn.PReLU()))
    row("sigmoid", lambda: between(torch.sigmoid))
    row("plus 1", lambda: between(lambda x: (x + 1).exp()))
    row("layer scale", lambda: around(Do(
        lambda m, x: x + m.gamma * m.conv(x), conv=conv(8, 8), gamma=parameter(8, 1, 1))))
    row("squeeze and excitation", lambda: between(Do(
        lambda m, x: x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        down=conv(8, 4, 1), up=conv(4, 8, 1))))
    row("mask of one channel", lambda: between(Do(
        lambda m, x: x * m.mask(x).sigmoid(), mask=conv(8, 1))), "block.norm.mask")
    row("pooling by a mask", lambda: around(Do(
        lambda m, x: x + m.mix(torch.einsum("nchw,nhw->nc", x, m.mask(x)[:, 0].sigmoid()))[..., None, None],
        mask=conv(8, 1), mix=nn.Linear(8, 8))), "block.mask")

    # shapes
    row("chunk", lambda: around(Do(
        lambda m, x: m.last(torch.cat([(y := m.conv(x).chunk(2, 1))[1], y[0].relu()], 1)),
        conv=conv(8, 12), last=conv(12, 8))))
    row("split in equal parts", lambda: around(Do(
        lambda m, x: (z := (y := m.conv(x)).split(y.shape[1] // 3, 1))[0] - z[1] * z[2], conv=conv(8, 18)), 6))
    row("split in parts of a stated width", lambda: around(Do(
        lambda m, x: (y := m.conv(x).split(m.width, 1))[0] - y[1] * y[2], conv=conv(8, 18), width=6), 6))  # fmt: skip
    row("split in stated parts", lambda: around(Do(
        lambda m, x: m.last(torch.cat(m.conv(x).split(m.sizes, 1)[::-1], 1)),
        conv=conv(8, 12), last=conv(12, 8), sizes=[4, 8])))  # fmt: skip
    row("split in parts of two stated widths", lambda: around(Do(
        lambda m, x: m.last(torch.cat(m.conv(x).split([m.dim_a, m.dim_b, m.dim_a], 1)[::-1], 1)),
        conv=conv(8, 14), last=conv(14, 8), dim_a=4, dim_b=6)))  # fmt: skip
    row("numbers in a stated shape", lambda: around(Do(
        lambda m, x: x + m.gamma.view(m.shape) * m.conv(x), conv=conv(8, 8), gamma=parameter(8), shape=(8, 1, 1))))
    row("split in parts of 6", lambda: around(Do(
        lambda m, x: torch.addcmul(*m.conv(x).split(6, 1)), conv=conv(8, 18)), 6))
    row("split in unequal parts", lambda: around(Do(
        lambda m, x: m.last(torch.cat(m.conv(x).split([4, 8], 1)[::-1], 1)),
        conv=conv(8, 12), last=conv(12, 8))))
    row("split of the stem", lambda: Do(
        lambda m, x: (y := torch.split(m.stem(x).relu(), [8, 16], dim=1)) and m.head(
            torch.cat([m.a(y[0]).relu(), m.b(y[1]).relu()], 1).mean((2, 3))),
        stem=nn.Conv2d(3, 24, 3, 2, 1), a=conv(8, 12), b=conv(16, 10, 1), head=nn.Linear(22, 5)))
    row("split within a split", lambda: around(Do(
        lambda m, x: m.last(torch.cat(
            [*m.inner(x).split([4, 8], 1)[::-1], m.conv(x).split(split_size=[5, 7], dim=-3)[1]], 1)),
        inner=Do(lambda m, x: torch.cat(m.conv(x).split_with_sizes([4, 8], 1)[::-1], 1), conv=conv(8, 12)),
        conv=conv(8, 12), last=conv(19, 8))))
    row("split twice alike", lambda: around(Do(
        lambda m, x: m.last(torch.cat([*m.a(x).split((4, 8), 1), *m.b(x).split((4, 8), 1)][::-1], 1)),
        a=conv(8, 12), b=conv(8, 12), last=conv(24, 8))))
    row("split of a block that runs twice", lambda: around(Do(
        lambda m, x: m.block(m.block(x).relu()),
        block=Do(lambda m, x: torch.cat(m.conv(x).split([3, 5], 1)[::-1], 1), conv=conv(8, 8)))))
    row("split in parts of 8 and a rest", lambda: around(Do(
        lambda m, x: m.last(torch.cat(m.conv(x).split(8, 1)[::-1], 1)), conv=conv(8, 20), last=conv(20, 8))))
    row("chunks of unequal widths", lambda: around(Do(
        lambda m, x: m.last(torch.cat(m.conv(x).chunk(3, 1)[::-1], 1)), conv=conv(8, 20), last=conv(20, 8))))
    row("chunks of unequal widths in blocks", lambda: around(nn.Sequential(*(Do(
        lambda m, x: x + m.last(torch.cat(m.conv(x).relu().chunk(3, 1)[::-1], 1)), conv=conv(8, 10), last=conv(10, 8))
        for _ in range(2)))))
    row("chunks of two widths", lambda: around(Do(
        lambda m, x: m.last(torch.cat([*m.a(x).chunk(3, 1)[::-1], *m.b(x).chunk(3, 1)], 1)),
        a=conv(8, 20), b=conv(8, 12), last=conv(32, 8))), "block.a", "block.b")
    row("chunks of another width inside", lambda: around(Do(
        lambda m, x: m.last(torch.cat([*m.a(m.inner(x)).chunk(3, 1)[::-1]], 1)),
        inner=Do(lambda m, x: torch.addcmul(*m.b(x).chunk(3, 1)), b=conv(8, 12)), a=conv(4, 20), last=conv(20, 8))),
        "block.a", "block.inner.b")
    row("slices", lambda: around(Do(
        lambda m, x: m.last(torch.cat([(y := m.conv(x))[:, 8:], y[:, 3:5], y[:, :-8, ...].relu()], 1)),
        conv=conv(8, 12), last=conv(10, 8))))
    row("slices of tokens", lambda: on_tokens(Do(
        lambda m, x: m.last(torch.cat([(y := m.fc(x))[..., 8:], y.narrow(-1, 0, 5).relu()], -1)),
        fc=nn.Linear(8, 12), last=nn.Linear(9, 8))))
    row("slices that gate each other", lambda: around(Do(
        lambda m, x: (y := m.conv(x))[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :].sigmoid(), conv=conv(8, 12)), 6))
    row("computed slices", lambda: around(Do(
        lambda m, x: m.last(torch.cat([(y := m.conv(x))[:, y.shape[1] // 2 :], y[:, : y.shape[1] // 2].relu()], 1)),
        conv=conv(8, 12), last=conv(12, 8))), "block.conv")
    row("split in computed parts", lambda: around(Do(
        lambda m, x: m.last(torch.cat((y := m.conv(x)).split([y.shape[1] // 3, 2 * y.shape[1] // 3], 1)[::-1], 1)),
        conv=conv(8, 12), last=conv(12, 8))), "block.conv")
    row("slices of two layers", lambda: around(Do(
        lambda m, x: m.last(torch.cat([m.a(x)[:, :8], m.b(x)[:, :8]], 1)),
        a=conv(8, 12), b=conv(8, 10), last=conv(16, 8))), "block.a", "block.b")
    row("slices of everything", lambda: around(Do(
        lambda m, x: m.last(torch.cat([m.a(x)[:, 0:], m.b(x)[:, 0:]], 1)),
        a=conv(8, 12), b=conv(8, 10), last=conv(22, 8))))
    row("every second channel", lambda: around(Do(
        lambda m, x: m.last(m.conv(x)[:, ::2]), conv=conv(8, 12), last=conv(6, 8))), "block.conv")
    row("stack", lambda: around(Do(
        lambda m, x: torch.stack([m.a(x), m.b(x)], 1).amax(1), a=conv(8, 6), b=conv(8, 6)), 6))
    row("unbind", lambda: around(Do(
        lambda m, x: torch.mul(*m.conv(x).unflatten(1, (2, -1)).unbind(1)), conv=conv(8, 12)), 6))
    row("channel shuffle", lambda: between(lambda x: F.channel_shuffle(x, 2)))
    row("channel shuffle by views", lambda: around(Do(
        lambda m, x: shuffle(torch.cat([(y := x.chunk(2, 1))[0], m.conv(y[1])], 1)), conv=conv(4, 4))))
    row("pixel shuffle", lambda: between(lambda x: F.pixel_shuffle(x, 2), 2))
    row("pixel unshuffle", lambda: between(lambda x: F.pixel_unshuffle(x, 2), 32))
    row("unfold", lambda: between(lambda x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 32))
    row("unfold and fold", lambda: between(lambda x: F.fold(F.unfold(x, 3, padding=1) ** 2, (8, 8), 3, padding=1)))
    row("space to depth by views", lambda: between(fold, 32))
    row("flatten", lambda: around(Do(
        lambda m, x: m.linear(m.pool(x).flatten(1))[..., None, None],
        pool=nn.MaxPool2d(4), linear=nn.Linear(32, 6)), 6))
    row("permute and flatten", lambda: around(Do(
        lambda m, x: m.linear(m.pool(x).permute(0, 2, 3, 1).flatten(1))[..., None, None],
        pool=nn.AdaptiveAvgPool2d(2), linear=nn.Linear(32, 6)), 6))
    row("concatenation and flatten", lambda: around(Do(
        lambda m, x: m.linear(m.pool(torch.cat([x, m.conv(x)], 1)).flatten(1))[..., None, None],
        conv=conv(8, 4), pool=nn.AvgPool2d(4), linear=nn.Linear(48, 6)), 6))
    row("shortcut that slices and pads", lambda: around(Do(
        lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.conv(x), conv=conv(8, 12, stride=2)), 12))
    row("interpolation", lambda: around(Do(
        lambda m, x: m.a(x) + F.interpolate(m.b(F.avg_pool2d(x, 2)), scale_factor=2, mode="bilinear"),
        a=conv(8, 6), b=conv(8, 6)), 6))

    # modules and parameters that are used twice
    row("called twice", lambda: around(Do(lambda m, x: m.conv(m.conv(x).relu()), conv=conv(8, 8))))
    row("called twice with a norm", lambda: around(Do(
        lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())), conv=conv(8, 8), norm=nn.LayerNorm((8, 8, 8)))))
    row("tied weights", tied)
    row("readers defined first", lambda: Do(
        lambda m, x: m.head(m.last(m.norm(torch.cat([m.a(x), m.b(x)], 1)).relu()).relu().mean((2, 3))),
        last=conv(12, 6), norm=nn.BatchNorm2d(12), b=conv(3, 8), a=conv(3, 4), head=nn.Linear(6, 5)))

    # gates, MLPs and attention
    row("GLU", lambda: around(Do(lambda m, x: F.glu(m.conv(x), 1), conv=conv(8, 12)), 6))
    row("gated depthwise", lambda: around(Do(
        lambda m, x: m.last(F.gelu((y := m.deep(m.wide(x)).chunk(2, 1))[0]) * y[1]),
        wide=conv(8, 12, 1), deep=conv(12, 12, groups=12), last=conv(6, 8, 1))))
    row("SwiGLU", lambda: on_tokens(Do(
        lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(8, 12), up=nn.Linear(8, 12), down=nn.Linear(12, 8))))
    row("MLP over channels and tokens", lambda: on_tokens(Do(
        lambda m, x: x + m.back(F.gelu(m.wide(x))) + m.under(m.over(x.mT).relu()).mT,
        wide=nn.Linear(8, 12), back=nn.Linear(12, 8), over=nn.Linear(4, 6), under=nn.Linear(6, 4))), "block.under")
    row("ConvNeXt", lambda: around(Do(
        lambda m, x: x + (m.gamma * m.back(F.gelu(m.wide(m.norm(m.deep(x).permute(0, 2, 3, 1)))))).permute(0, 3, 1, 2),
        deep=conv(8, 8, 5, groups=8), norm=nn.LayerNorm(8), wide=nn.Linear(8, 16), back=nn.Linear(16, 8),
        gamma=parameter(8))))
    row("attention", lambda: on_tokens(attention(), 12, 12))
    row("attention, batch second", lambda: on_tokens(attention(batch_first=False), 12, 12))
    row("attention with its weights", lambda: on_tokens(attention(need_weights=True), 12, 12))
    row("attention without biases", lambda: on_tokens(attention(bias=False), 12, 12))
    row("attention to others", lambda: on_tokens(attention(cross=True), 12, 12))
    row("attention to narrower others", lambda: on_tokens(attention(cross=True, kdim=8, vdim=8), 12, 12))
    row("attention to a learned token", lambda: on_tokens(nn.Sequential(
        attention(add_bias_kv=True), nn.Linear(12, 8)), 8, 12), "stem", "block.0.attend")
    row("attention to zero", lambda: on_tokens(nn.Sequential(
        attention(add_zero_attn=True), nn.Linear(12, 8)), 8, 12), "stem", "block.0.attend")
    row("encoder layer, norm first", lambda: on_tokens(
        nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, norm_first=True), 12, 12))
    row("encoder layer, norm last", lambda: on_tokens(
        nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True), 12, 12))
    row("attention with one layer", lambda: on_tokens(Heads(), 12, 12))
    row("attention with one layer, by hand", lambda: on_tokens(Heads(fused=False), 12, 12))
    row("attention with three layers", lambda: on_tokens(Heads(together=False), 12, 12))
    row("ViT", vit)
    row("heads as wide as the stream", lambda: on_tokens(WideHeads(12, 3), 12, 12))
    row("heads of two layers as wide as the stream", lambda: on_tokens(
        nn.Sequential(WideHeads(12, 3), nn.LayerNorm(12), WideHeads(12, 6)), 12, 12))  # fmt: skip
    row("one head as wide as the stream", lambda: on_tokens(nn.Sequential(
        nn.Linear(8, 12), WideHeads(12, 1), nn.Linear(12, 8))), *("block.0", "block.1.qkv", "block.1.proj"))
    row("a value that the net reads", lambda: Do(
        lambda m, x: m.head(m.stem(x).mul(2 if float(x.max()) > -1e9 else 1).relu().mean((2, 3))),
        stem=conv(3, 8), head=nn.Linear(8, 5)))  # fmt: skip

    # what stays
    row("softmax", lambda: between(lambda x: x.softmax(1)), "stem")
    row("roll", lambda: between(lambda x: x.roll(1, 1)), "stem")
    row("unknown operation", lambda: between(triple), "stem")
    row("operation without a rule", lambda: between(lambda x: x.logcumsumexp(1)), "stem")
    row("number of channels", lambda: between(lambda x: x / x.shape[1]), "stem")
    row("number of channels, a little", lambda: between(lambda x: x + 0.002 / x.shape[1]), "stem")
    row("attention with one head", lambda: on_tokens(Heads(num_heads=1), 12, 12), "block.qkv")
    row("attention of torch with one head", lambda: on_tokens(attention(num_heads=1), 12, 12), "block.attend")
    return rows
# fmt: on


ROWS = _rows()


def make(name: str) -> nn.Module:
    """One of these nets, with the same weights each time."""
    torch.manual_seed(0)
    return ROWS[name].make()
