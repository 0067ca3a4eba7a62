"""Random nets, composed from the blocks of known nets. They map images [N, 3, 8, 8] to 5 logits."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from helpers.coupled_nets import Do, Heads, conv, parameter
from torch import Tensor, nn
from torch.nn import functional as F

Block = Callable[[int, Random], tuple[nn.Module, int]]
"""Makes a block for this number of channels, a multiple of 4; the block and the number of channels after it."""

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.ELU)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(width: int, draw: Random) -> nn.Module:
    return draw.choice(
        [
            lambda: nn.BatchNorm2d(width),
            lambda: nn.BatchNorm2d(width, affine=False),
            lambda: nn.GroupNorm(draw.choice([1, 2, width]), width),
            lambda: nn.InstanceNorm2d(width, affine=draw.random() < 0.5),
            lambda: nn.LocalResponseNorm(3, 0.1),
            lambda: LayerNorm2d(width),
            nn.Identity,
        ]
    )()


def activation(width: int, draw: Random) -> nn.Module:
    return nn.PReLU(width) if draw.random() < 0.2 else draw.choice(ACTIVATIONS)()


def some(draw: Random) -> int:
    return draw.choice([4, 8, 12, 16])


def layer(num_in: int, num_out: int, draw: Random, size: int = 3, **options: Any) -> nn.Sequential:
    """A convolution, a norm and an activation, in one of two orders."""
    convolution = conv(num_in, num_out, size, **options, bias=draw.random() < 0.5)
    if draw.random() < 0.3:
        return nn.Sequential(norm(num_in, draw), activation(num_in, draw), convolution)
    return nn.Sequential(convolution, norm(num_out, draw), activation(num_out, draw))


def plain(width: int, draw: Random) -> tuple[nn.Module, int]:
    out = some(draw)
    return layer(width, out, draw), out


def residual(width: int, draw: Random) -> tuple[nn.Module, int]:
    inner = some(draw)
    body = nn.Sequential(layer(width, inner, draw), layer(inner, width, draw))
    return Do(lambda m, x: x + m.gamma * m.body(x), body=body, gamma=parameter(width, 1, 1)), width


def projected(width: int, draw: Random) -> tuple[nn.Module, int]:
    """A residual block whose shortcut is a convolution."""
    out = some(draw)
    return Do(lambda m, x: m.act(m.short(x) + m.body(x)), short=conv(width, out, 1), body=layer(width, out, draw),
              act=activation(out, draw)), out  # fmt: skip


def inverted(width: int, draw: Random) -> tuple[nn.Module, int]:
    """Wide, depthwise, squeeze and excitation, narrow."""
    inner, times = some(draw), draw.choice([1, 2])
    deep = layer(inner, inner * times, draw, groups=inner) if times == 1 else conv(inner, inner * times, groups=inner)
    return Do(
        lambda m, x: x + m.narrow((y := m.deep(m.wide(x))) * m.squeeze(y)),
        wide=layer(width, inner, draw, 1), deep=deep, narrow=conv(inner * times, width, 1), squeeze=nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(inner * times, 4, 1), nn.ReLU(), conv(4, inner * times, 1), nn.Sigmoid()),
    ), width  # fmt: skip


def dense(width: int, draw: Random) -> tuple[nn.Module, int]:
    a, b, out = some(draw), some(draw), some(draw)
    return Do(
        lambda m, x: m.last(m.norm(torch.cat([x, y := m.a(x), m.b(torch.cat([x, y], 1))], 1))),
        a=layer(width, a, draw), b=layer(width + a, b, draw), norm=norm(width + a + b, draw),
        last=layer(width + a + b, out, draw, 1),
    ), out  # fmt: skip


def grouped(width: int, draw: Random) -> tuple[nn.Module, int]:
    out = some(draw)
    return nn.Sequential(layer(width, out, draw, groups=draw.choice([2, 4])), nn.ChannelShuffle(2)), out


def gated(width: int, draw: Random) -> tuple[nn.Module, int]:
    out = some(draw)
    functions = (
        lambda m, x: F.glu(m.conv(x), 1),
        lambda m, x: torch.mul(*m.act(m.conv(x)).chunk(2, 1)),
        lambda m, x: torch.sub(*m.act(m.conv(x)).unflatten(1, (2, -1)).unbind(1)),
    )
    return Do(draw.choice(functions), conv=conv(width, 2 * out), act=draw.choice(ACTIVATIONS)()), out


def halves(width: int, draw: Random) -> tuple[nn.Module, int]:
    """One half is computed, and both are shuffled."""
    function = lambda m, x: F.channel_shuffle(torch.cat([(y := x.chunk(2, 1))[0], m.body(y[1])], 1), 2)  # noqa: E731
    return Do(function, body=layer(width // 2, width // 2, draw)), width


def folded(width: int, draw: Random) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.PixelUnshuffle(2), conv(4 * width, 2 * width, 1), nn.PixelShuffle(2)), width // 2


def up_and_down(width: int, draw: Random) -> tuple[nn.Module, int]:
    out = some(draw)
    return nn.Sequential(nn.ConvTranspose2d(width, out, 2, 2), activation(out, draw), nn.MaxPool2d(2)), out


def again(width: int, draw: Random) -> tuple[nn.Module, int]:
    return Do(lambda m, x: m.body(m.body(x)), body=layer(width, width, draw)), width


def branches(width: int, draw: Random) -> tuple[nn.Module, int]:
    a, b = some(draw), some(draw)
    return Do(
        lambda m, x: m.norm(torch.cat([m.a(x), m.pool(x), m.b(x)], 1)), b=layer(width, b, draw), a=conv(width, a, 1),
        pool=nn.AvgPool2d(3, 1, 1), norm=norm(width + a + b, draw),
    ), width + a + b  # fmt: skip


def masked(width: int, draw: Random) -> tuple[nn.Module, int]:
    return Do(lambda m, x: x * m.mask(x).sigmoid(), mask=conv(width, 1)), width


def convnext(width: int, draw: Random) -> tuple[nn.Module, int]:
    inner = some(draw)
    return Do(
        lambda m, x: x + (m.gamma * m.back(F.gelu(m.wide(m.norm(m.deep(x).permute(0, 2, 3, 1)))))).permute(0, 3, 1, 2),
        deep=conv(width, width, groups=width), norm=draw.choice([nn.LayerNorm, nn.RMSNorm])(width),
        wide=nn.Linear(width, inner), back=nn.Linear(inner, width), gamma=parameter(width),
    ), width  # fmt: skip


def on_tokens(block: nn.Module) -> nn.Module:
    return Do(lambda m, x: m.block(x.flatten(2).mT).mT.unflatten(2, x.shape[2:]), block=block)


def attention(width: int, draw: Random) -> tuple[nn.Module, int]:
    heads = Heads(width, draw.choice([2, 4]), draw.random() < 0.5, draw.random() < 0.5)
    return on_tokens(Do(lambda m, x: x + m.heads(m.norm(x)), norm=nn.LayerNorm(width), heads=heads)), width


def encoder(width: int, draw: Random) -> tuple[nn.Module, int]:
    options = {"batch_first": True, "norm_first": draw.random() < 0.5}
    return on_tokens(nn.TransformerEncoderLayer(width, draw.choice([2, 4]), some(draw), 0.0, **options)), width


def mlp(width: int, draw: Random) -> tuple[nn.Module, int]:
    inner = some(draw)
    block = Do(
        lambda m, x: x + m.down(F.silu(m.gate(m.norm(x))) * m.up(x)), norm=nn.RMSNorm(width),
        gate=nn.Linear(width, inner), up=nn.Linear(width, inner), down=nn.Linear(inner, width),
    )  # fmt: skip
    return on_tokens(block), width


BLOCKS: tuple[Block, ...] = (
    *(plain, residual, projected, inverted, dense, grouped, gated, halves, folded, up_and_down, again, branches),
    *(masked, convnext, attention, encoder, mlp),
)


def random_net(seed: int) -> nn.Module:
    """A stem, three or four blocks, and one of three heads."""
    draw = Random(seed)
    torch.manual_seed(seed)
    width = some(draw)
    blocks: list[nn.Module] = [conv(3, width)]
    for _ in range(draw.choice([2, 3, 4])):
        made = draw.choice([each for each in BLOCKS if width % 8 == 0 or each is not folded])
        block, width = made(width, draw)
        blocks.append(block)
    head = draw.choice(["mean", "flat", "hidden"])
    if head == "mean":
        layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    elif head == "flat":
        layers = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * width, 5)]
    else:
        layers = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * width, 12), nn.ReLU(), nn.Linear(12, 5)]
    return nn.Sequential(*blocks, *layers)
