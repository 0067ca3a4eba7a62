"""Nets that are legal and unusual: images [N, 3, 16, 16] to 10 logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Plain(nn.Module):
    """Three convolutions and a head; the second convolution is what a subclass changes."""

    def __init__(self, num_classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.odd = self.odd_layer(width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def odd_layer(self, width: int) -> nn.Module:
        return nn.Conv2d(width, width, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.last(self.odd(self.stem(images).relu()).relu()).relu()
        return self.fc(x.mean(dim=(2, 3)))


class WeightNorm(Plain):
    """A weight that is computed from its length and its direction."""

    def odd_layer(self, width: int) -> nn.Module:
        return parametrizations.weight_norm(super().odd_layer(width))


class SpectralNorm(Plain):
    """A weight that is divided by its largest singular value."""

    def odd_layer(self, width: int) -> nn.Module:
        return parametrizations.spectral_norm(super().odd_layer(width))


class HookedNorm(Plain):
    """The old form of weight normalisation: a hook computes the weight before each forward pass."""

    def odd_layer(self, width: int) -> nn.Module:
        return nn.utils.weight_norm(super().odd_layer(width))


class StandardisedConv2d(nn.Conv2d):
    """Standardises its weight first (Qiao et al. 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean(dim=(1, 2, 3), keepdim=True), self.weight.std(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Standardised(Plain):
    """A subclass of ``Conv2d`` that computes something else."""

    def odd_layer(self, width: int) -> nn.Module:
        return StandardisedConv2d(width, width, 3, padding=1)


class ScalePerChannel(Plain):
    """A buffer with one constant for each channel, which a trace does not see as a part of the layer."""

    def __init__(self, num_classes: int = 10, width: int = 8) -> None:
        super().__init__(num_classes, width)
        self.register_buffer("scale", torch.linspace(0.5, 2, width).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.odd(self.stem(images).relu()) * self.scale
        return self.fc(self.last(x.relu()).relu().mean(dim=(2, 3)))


class FirstChannelsTwice(Plain):
    """The last half of the channels is computed with fixed numbers of channels."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.odd(self.stem(images).relu()).relu()
        x = x * torch.tensor([1.0, 2.0]).repeat_interleave(4).view(8, 1, 1)
        return self.fc(self.last(x).relu().mean(dim=(2, 3)))


class ComputedWidth(Plain):
    """Computes its width with tensors, as torchvision's RegNet does."""

    def __init__(self, num_classes: int = 10) -> None:
        widths = (torch.round(torch.linspace(4, 8, 3) / 4) * 4).int().tolist()
        super().__init__(num_classes, widths[-1])


class HiddenBuffer(Plain):
    """A buffer that is not in the state dict."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.register_buffer("positions", torch.arange(8.0) / 8, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.last(self.odd(self.stem(images)).relu()).relu().mean(dim=(2, 3)) + self.positions)


class PlainTensor(Plain):
    """A constant that is neither a parameter nor a buffer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.factor = torch.tensor(2.0)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.factor


class Greedy(nn.Module):
    """Reads the value of a tensor, and then asks for much memory: in one tensor, or in many."""

    def __init__(self, size: int, times: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        self.width = int(torch.tensor(1.0).item())
        self.parts = nn.ParameterList(torch.zeros(size) for _ in range(times))


class Shuffled(Plain):
    """A channel shuffle, as in ShuffleNet."""

    def forward(self, images: Tensor) -> Tensor:
        x = F.channel_shuffle(self.odd(self.stem(images).relu()).relu(), 2)
        return self.fc(self.last(x).relu().mean(dim=(2, 3)))


class TrainingHead(Plain):
    """A head that runs in training alone, and that reads the units of an inner layer."""

    def __init__(self, num_classes: int = 10, width: int = 8) -> None:
        super().__init__(num_classes, width)
        self.auxiliary = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.odd(self.stem(images).relu()).relu()
        logits = self.fc(self.last(x).relu().mean(dim=(2, 3)))
        return logits + 0.3 * self.auxiliary(x.mean(dim=(2, 3))) if self.training else logits
