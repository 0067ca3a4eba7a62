"""Small nets, one for each kind of layer that a quantized file may hold: images ``[N, 3, 16, 16]`` to ten logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE_SHAPE = (3, 16, 16)


def conv(inputs: int, outputs: int, size: int = 3, **arguments: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **arguments)  # type: ignore[arg-type]


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def normed(inputs: int, outputs: int, size: int = 3, **arguments: object) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, size, bias=False, **arguments), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


class Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Scale(nn.Module):
    """A convolution whose outputs are some times as large as its inputs."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)
        with torch.no_grad():
            self.conv.weight.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Dense(nn.Module):
    """Norm and activation before the convolution, whose output is added to the channels (DenseNet)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), conv(inputs, growth, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], 1)


class Twice(nn.Module):
    """One convolution that runs twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(functional.relu(self.conv(x))))


class ChannelAttention(nn.Module):
    """A one-dimensional convolution over the channels' means (ECA-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return x * scale[:, :, None, None]


class Attention(nn.Module):
    """Patches, then a transformer's block with one ``qkv`` layer."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3) / (width // self.heads) ** 0.5).softmax(3)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(n, tokens, width))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


class Torch(nn.Module):
    """A transformer's encoder as torch has it, with its own attention module."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class SplitChannels(nn.Module):
    """A block of ShuffleNet V2: one half of the channels passes, the other half is convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = normed(channels // 2, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return functional.channel_shuffle(torch.cat([kept, self.branch(changed)], 1), 2)


class ClassToken(nn.Module):
    """Patches behind a token that is expanded to the number of images, so the graph computes a shape."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.patches = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(functional.silu(self.stem(images))).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(images.shape[0], -1, -1), x], 1)
        return self.head(self.norm(x)[:, 3])


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 10)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10)),
    "tanh, average pooling": lambda: nn.Sequential(
        conv(3, 8, 5), nn.Tanh(), nn.AvgPool2d(2), conv(8, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 10),
    ),
    "batch norm, max pooling": lambda: nn.Sequential(normed(3, 16), nn.MaxPool2d(2), normed(16, 32), head(32)),
    "no norm": lambda: nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 32, 3, stride=2), nn.ReLU(), head(32)),
    "depthwise": lambda: nn.Sequential(normed(3, 16), normed(16, 16, 3, groups=16), normed(16, 32, 1), head(32)),
    "grouped": lambda: nn.Sequential(normed(3, 16), normed(16, 32, 3, groups=4), head(32)),
    "residual": lambda: nn.Sequential(normed(3, 16), Residual(normed(16, 16)), Residual(conv(16, 16)), head(16)),
    "inception": lambda: nn.Sequential(
        normed(3, 16),
        Branches(normed(16, 8, 1), normed(16, 16), nn.Sequential(nn.MaxPool2d(3, 1, 1), normed(16, 8, 1))),
        nn.MaxPool2d(2), normed(32, 32), head(32),
    ),
    "pool into a concatenation": lambda: nn.Sequential(
        normed(3, 16), Branches(nn.Sequential(normed(16, 16, 3, stride=2), Scale(4), nn.ReLU()), nn.MaxPool2d(2)),
        normed(32, 32), head(32),
    ),
    "signed values": lambda: nn.Sequential(
        conv(3, 16), Branches(Scale(3), nn.MaxPool2d(3, 1, 1)), nn.MaxPool2d(2),
        Branches(conv(32, 16), nn.MaxPool2d(3, 1, 1)), conv(48, 16), nn.ReLU(), head(16),
    ),
    "squeeze and excitation": lambda: nn.Sequential(normed(3, 16), SqueezeExcite(16), normed(16, 32), head(32)),
    "hard swish": lambda: nn.Sequential(conv(3, 16), nn.Hardswish(), conv(16, 32), nn.Hardswish(), head(32)),
    "silu": lambda: nn.Sequential(conv(3, 16), nn.SiLU(), conv(16, 32), nn.SiLU(), head(32)),
    "relu6": lambda: nn.Sequential(conv(3, 16), nn.ReLU6(), conv(16, 32), nn.ReLU6(), head(32)),
    "leaky relu": lambda: nn.Sequential(conv(3, 16), nn.LeakyReLU(0.1), conv(16, 32), nn.PReLU(32), head(32)),
    "group norm": lambda: nn.Sequential(conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), conv(16, 32), nn.ReLU(), head(32)),
    "dilated, one-sided": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(16, 16, (1, 5), padding=(0, 2)), nn.ReLU(),
        nn.Conv2d(16, 32, (5, 1), padding=(2, 0)), nn.ReLU(), head(32),
    ),
    "dense": lambda: nn.Sequential(conv(3, 16), Dense(16, 8), Dense(24, 8), nn.BatchNorm2d(32), nn.ReLU(), head(32)),
    "one layer twice": lambda: nn.Sequential(normed(3, 16), Twice(16), head(16)),
    "channel shuffle": lambda: nn.Sequential(
        normed(3, 16), conv(16, 16, 1, groups=4), nn.ChannelShuffle(4), nn.ReLU(), normed(16, 32), head(32)
    ),
    "split": lambda: nn.Sequential(normed(3, 16), SplitChannels(16), SplitChannels(16), normed(16, 32), head(32)),
    "pixel unshuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), normed(12, 32), normed(32, 16), head(16)),
    "transposed": lambda: nn.Sequential(
        normed(3, 16, 3, stride=2), nn.ConvTranspose2d(16, 16, 2, 2), nn.ReLU(), normed(16, 16), head(16)
    ),
    "one-dimensional": lambda: nn.Sequential(normed(3, 16), ChannelAttention(), normed(16, 16), head(16)),
    "odd rows": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 57), nn.ReLU(), nn.Linear(57, 10)),
    "class token": ClassToken,
    "attention": Attention,
    "attention of torch": Torch,
}  # fmt: skip


def small_net(name: str, images: Tensor) -> nn.Module:
    """A net with the statistics of ``images`` in its norms, in evaluation mode, always the same."""
    torch.manual_seed(0)
    net = NETS[name]().train()
    with torch.no_grad():
        for _ in range(3):
            net(images)
    return net.eval()


def small_images(count: int, seed: int = 1) -> Tensor:
    """Smooth random images ``[count, 3, 16, 16]``, whose neighbouring pixels are alike as those of photos are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    fine = functional.interpolate(coarse, size=16, mode="bilinear", align_corners=True)
    return (1.5 * fine + 0.2 * torch.randn(count, 3, 16, 16, generator=generator)).contiguous()
