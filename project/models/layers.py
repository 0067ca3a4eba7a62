"""The layers every net is made of: convolution + norm + activation, norms with one signature, dropout of three kinds.

Norms are handed to nets as factories that take the number of channels first, so that ``norm: project.models.GroupNorm``
in YAML just works (``torch.nn.GroupNorm`` takes ``num_groups`` first). Dropout is handed over as a class that
takes the rate.

Papers: batch norm, Ioffe & Szegedy 2015 (arXiv:1502.03167, Alg. 1); group norm, Wu & He 2018 (arXiv:1803.08494, sec.
3); layer norm, Ba et al. 2016 (arXiv:1607.06450, eq. 4); instance norm, Ulyanov et al. 2016 (arXiv:1607.08022, eq. 5);
dropout, Srivastava et al. 2014 (JMLR 15, sec. 4); channel dropout, Tompson et al. 2015 (arXiv:1411.4280, sec. 3.2);
drop path, Larsson et al. 2017 (arXiv:1605.07648, sec. 3.1).
"""

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

kernels: Any = None
"""The optional folder of C kernels, put here by :mod:`project.models`; ``None`` in a copy without it."""

NormFactory = Callable[[int], nn.Module]
"""Number of channels -> a module that keeps the shape ``[N, C, H, W]``."""
DropoutFactory = Callable[[float], nn.Module]
"""Rate in [0, 1) -> a module that keeps the shape."""
WeightInit = Callable[[Tensor], Tensor]
"""Fills a weight in place, such as ``torch.nn.init.kaiming_normal_``."""


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over ``[N, C, H, W]`` (Ioffe & Szegedy 2015, Alg. 1)."""


class GroupNorm(nn.GroupNorm):
    """Group norm, channels first in the signature.

    Args:
        num_channels: channels of the input.
        num_groups: wished number of groups; the greatest common divisor with ``num_channels`` is taken,
            so that a width that 8 does not divide still builds.
    """

    def __init__(self, num_channels: int, num_groups: int = 8) -> None:
        super().__init__(gcd(num_groups, num_channels), num_channels)


class LayerNorm(nn.GroupNorm):
    """Layer norm over channels and pixels of one image (group norm with one group; Wu & He 2018, fig. 2)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(1, num_channels)


class InstanceNorm(nn.InstanceNorm2d):
    """Instance norm with learned scale and shift.

    A 1x1 map equals its mean, so that normalising leaves nothing of it: such maps get the scale and the shift only.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2:].numel() > 1:
            return super().forward(input)
        return input * self.weight[:, None, None] + self.bias[:, None, None]


class NoNorm(nn.Identity):
    """No norm: the control. A convolution before it gets a bias."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()


class ReLU(nn.ReLU):
    """ReLU in place: the norm before it does not need its output for the gradient, so one copy per map is saved."""

    def __init__(self) -> None:
        super().__init__(inplace=True)


class MaxPool(nn.MaxPool2d):
    """Max pooling; in training on a CPU by a kernel that remembers a window's winner in one byte instead of eight."""

    def forward(self, input: Tensor) -> Tensor:
        y = kernels.max_pool(input, self) if self.training and kernels is not None else None
        return super().forward(input) if y is None else y


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero whole samples with probability ``p`` and scale the others by ``1 / (1 - p)``; identity in eval."""
    if p == 0.0 or not training:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - p)
    return x * keep.div_(1 - p)


class DropPath(nn.Module):
    """Drop a branch for some samples (Larsson et al. 2017, sec. 3.1, local sampling; scaled so that the mean is kept).

    Args:
        p: probability to drop a sample's branch, in [0, 1).

    Raises:
        ValueError: for a ``p`` outside [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        _check_rate(p, "p")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def make_dropout(dropout: DropoutFactory, rate: float, name: str) -> nn.Module:
    """A dropout module, or an identity at rate 0.

    Args:
        dropout: class or factory that takes the rate.
        rate: probability to drop, in [0, 1).
        name: the argument's name, for the error.

    Raises:
        ValueError: for a rate outside [0, 1).
    """
    _check_rate(rate, name)
    return dropout(rate) if rate > 0 else nn.Identity()


def _check_rate(rate: float, name: str) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate}, but a dropout rate lies in [0, 1): 0 switches it off.")


class ConvNormAct(nn.Sequential):
    """Convolution, norm, activation: ``[N, in_channels, H, W] -> [N, out_channels, H', W']``.

    Args:
        in_channels, out_channels: channels.
        kernel_size: side, or (height, width).
        stride: step.
        padding: pixels on each side; ``None`` keeps the size at stride 1 (odd kernels).
        norm: factory of the norm; the convolution has a bias only without one (batch norm's shift replaces it,
            Ioffe & Szegedy 2015, sec. 3.2).
        activation: factory of the activation.
        pool: factory of a pooling after the activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        *,
        norm: NormFactory = BatchNorm,
        activation: Callable[[], nn.Module] = ReLU,
        pool: Callable[[], nn.Module] | None = None,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if padding is None:
            padding = (height // 2, width // 2)
        normed = norm(out_channels)
        super().__init__()
        bias = isinstance(normed, nn.Identity)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.norm = normed
        self.act = activation()
        if pool is not None:
            self.pool = pool()

    def forward(self, x: Tensor) -> Tensor:
        """One after the other; in training on a CPU what follows the convolution is one operation, and all of it on
        images.
        """
        pool = getattr(self, "pool", None)
        if kernels is None:
            y = self.act(self.norm(self.conv(x)))
            return y if pool is None else pool(y)
        y = kernels.first_layer(x, self.conv, self.norm, self.act, pool)
        if y is not None:
            return y
        x = self.conv(x)
        y = None if pool is None else kernels.batch_norm_relu_pool(x, self.norm, self.act, pool)
        if y is not None:
            return y
        y = kernels.batch_norm_relu(x, self.norm, self.act)
        y = self.act(self.norm(x)) if y is None else y
        return y if pool is None else pool(y)


ConvFactory = Callable[..., nn.Module]
"""``(in_channels, out_channels, kernel_size, stride, padding)`` -> convolution with its norm and activation."""


def conv_factory(norm: NormFactory, activation: Callable[[], nn.Module]) -> ConvFactory:
    """What the blocks get: a :class:`ConvNormAct` with norm and activation filled in."""
    return partial(ConvNormAct, norm=norm, activation=activation)


def init_weights_(net: nn.Module, weight_init: WeightInit) -> None:
    """Fill each convolution's and linear layer's weight with ``weight_init`` and its bias with zeros, in place; the net
    remembers ``weight_init`` for :func:`reinit_`.
    """
    net.weight_init = weight_init  # type: ignore[assignment]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight_init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def reinit_(net: nn.Module) -> None:
    """New random weights as a fresh net of this kind has them, norms and their statistics included, in place."""
    for module in net.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    if (weight_init := getattr(net, "weight_init", None)) is not None:
        init_weights_(net, weight_init)


def scale_channels(channels: int, width: float) -> int:
    """``channels * width``, rounded to a multiple of 8 (vector width of convolution kernels), at least 8."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


def check_images(images: Tensor, image_shape: tuple[int, ...], net: nn.Module) -> None:
    """Refuse images that the net was not built for.

    Raises:
        ValueError: when ``images`` is not ``[N, C, H, W]`` with the net's ``image_shape``.
    """
    if images.dim() != 4 or tuple(images.shape[1:]) != tuple(image_shape):
        wanted = ", ".join(map(str, image_shape))
        raise ValueError(
            f"images are {list(images.shape)}, but this {type(net).__name__} takes [N, {wanted}]: "
            "resize or convert the images, or build the net with their image_shape."
        )


def check_sides(image_shape: tuple[int, int, int], smallest: int, net: nn.Module) -> None:
    """Refuse to build a net whose last maps would be empty.

    Raises:
        ValueError: when height or width is under ``smallest`` pixels.
    """
    _, height, width = image_shape
    if min(height, width) < smallest:
        raise ValueError(
            f"image_shape is {tuple(image_shape)}, but {type(net).__name__} takes sides of at least {smallest} pixels: "
            "resize the images (data.image_size) or choose project.models.SmallInception."
        )


def scale_widths(channels: tuple[int, ...], width: float) -> tuple[int, ...]:
    """:func:`scale_channels` of several counts.

    Raises:
        ValueError: for a ``width`` that is not positive.
    """
    if not width > 0:
        raise ValueError(f"width is {width}, but it multiplies channel counts: choose a number above 0.")
    return tuple(scale_channels(count, width) for count in channels)


def spatial_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """Side after a convolution or pooling: ``floor((size + 2 padding - kernel) / stride) + 1``."""
    return (size + 2 * padding - kernel_size) // stride + 1


class GlobalAvgPool(nn.Module):
    """Mean over pixels: ``[N, C, H, W] -> [N, C]`` (Lin et al. 2014, Network in Network, sec. 3.2).

    In training the sum is divided: so the gradient is before it is spread over the pixels, which then takes no memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x.sum(dim=(2, 3)) / x.shape[2:].numel()
        return torch.mean(x, dim=(2, 3))
