"""The layers of every net: convolution + norm + activation, norms with one signature, dropout of three kinds.

Nets take norms as factories whose first argument is the number of channels. So ``norm: project.models.GroupNorm`` works
in YAML (``torch.nn.GroupNorm`` takes ``num_groups`` first). Nets take dropout as a class whose argument is the rate.

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
"""The optional folder of C kernels; :mod:`project.models` sets it. ``None`` if the folder was deleted."""

NormFactory = Callable[[int], nn.Module]
"""Number of channels -> a module that keeps the shape ``[N, C, H, W]``."""
DropoutFactory = Callable[[float], nn.Module]
"""Rate in [0, 1) -> a module that keeps the shape."""
WeightInit = Callable[[Tensor], Tensor]
"""Fills a weight in place, such as ``torch.nn.init.kaiming_normal_``."""


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over ``[N, C, H, W]`` (Ioffe & Szegedy 2015, Alg. 1).

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {norm: project.models.BatchNorm}
    """


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018, sec. 3). The number of channels is the first argument.

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {norm: project.models.GroupNorm}

    Args:
        num_channels: number of channels of the input, at least 1.
        num_groups: wanted number of groups, at least 1. The real number is its greatest common divisor with
            ``num_channels``, so a width that is not a multiple of 8 works too.
    """

    def __init__(self, num_channels: int, num_groups: int = 8) -> None:
        super().__init__(gcd(num_groups, num_channels), num_channels)


class LayerNorm(nn.GroupNorm):
    """Layer norm over channels and pixels of one image (group norm with one group; Wu & He 2018, fig. 2).

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {norm: project.models.LayerNorm}

    Args:
        num_channels: number of channels of the input, at least 1.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(1, num_channels)


class InstanceNorm(nn.InstanceNorm2d):
    """Instance norm with learned scale and shift (Ulyanov et al. 2016, eq. 5).

    A 1x1 map equals its own mean, so normalisation would make it 0. Such maps get the scale and the shift only.

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {norm: project.models.InstanceNorm}

    Args:
        num_channels: number of channels of the input, at least 1.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2:].numel() > 1:
            return super().forward(input)
        return input * self.weight[:, None, None] + self.bias[:, None, None]


class NoNorm(nn.Identity):
    """An identity in the place of a norm, to compare with nets that have one. A convolution before it gets a bias.

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {norm: project.models.NoNorm}

    Args:
        num_channels: number of channels of the input, any number; it is not used.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()


class ReLU(nn.ReLU):
    """ReLU in place. The norm before it does not need its own output for the gradient, so one copy per map is saved.

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {activation: project.models.ReLU}
    """

    def __init__(self) -> None:
        super().__init__(inplace=True)


class MaxPool(nn.MaxPool2d):
    """Max pooling. In training on a CPU a compiled kernel runs, which stores a window's winner in few bytes.

    Torch stores the place of the winner in eight bytes, the kernel in as many bytes as a value of the map has.

    Example::

        >>> import torch
        >>> from project.models import MaxPool
        >>> MaxPool(3, stride=2, ceil_mode=True)(torch.rand(2, 8, 28, 28)).shape
        torch.Size([2, 8, 14, 14])
    """

    def forward(self, input: Tensor) -> Tensor:
        y = kernels.max_pool(input, self) if self.training and kernels is not None else None
        return super().forward(input) if y is None else y


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Set whole samples to 0 with probability ``p`` and scale the others by ``1 / (1 - p)``; identity in eval mode."""
    if p == 0.0 or not training:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - p)
    return x * keep.div_(1 - p)


class DropPath(nn.Module):
    """Drop a branch for some samples (Larsson et al. 2017, sec. 3.1, local sampling), scaled so that the mean is kept.

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {conv_dropout: 0.1, conv_dropout_type: project.models.DropPath}

    Args:
        p: probability that a sample's branch is dropped, in [0, 1).

    Raises:
        ValueError: if ``p`` is outside [0, 1).
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
        dropout: class or factory whose only argument is the rate.
        rate: probability to drop a value, in [0, 1).
        name: name of the net's argument, for the error message.

    Raises:
        ValueError: if the rate is outside [0, 1).
    """
    _check_rate(rate, name)
    return dropout(rate) if rate > 0 else nn.Identity()


def _check_rate(rate: float, name: str) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate}, but a dropout rate lies in [0, 1): 0 switches it off.")


class ConvNormAct(nn.Sequential):
    """Convolution, norm, activation: ``[N, in_channels, H, W] -> [N, out_channels, H', W']``.

    Args:
        in_channels: number of channels of the input, at least 1.
        out_channels: number of channels of the output, at least 1.
        kernel_size: side of the kernel in pixels, or (height, width).
        stride: step of the convolution in pixels, at least 1.
        padding: number of zeros on each side, or (above and below, left and right). ``None`` keeps the size of the map
            at stride 1, for odd kernels.
        norm: factory of the norm, which takes the number of channels. The convolution has a bias only if this gives an
            ``nn.Identity``, because the norm's shift replaces a bias (Ioffe & Szegedy 2015, sec. 3.2).
        activation: factory of the activation, called without arguments.
        pool: factory of a pooling after the activation, called without arguments. ``None`` means no pooling.
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
        """Run the layers one after the other, or compiled kernels in their place in training on a CPU.

        A kernel fuses what follows the convolution into one operation. On images, one kernel does all the layers. Each
        kernel returns ``None`` if it cannot do the job; then the layers themselves run.
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
"""``(in_channels, out_channels, kernel_size, stride, padding)`` -> a convolution with its norm and activation."""


def conv_factory(norm: NormFactory, activation: Callable[[], nn.Module]) -> ConvFactory:
    """The factory of convolutions that blocks take: :class:`ConvNormAct` with this norm and activation."""
    return partial(ConvNormAct, norm=norm, activation=activation)


def init_weights_(net: nn.Module, weight_init: WeightInit) -> None:
    """Fill the weights of convolutions and linear layers with ``weight_init``, and their biases with zeros, in place.

    The net keeps ``weight_init`` as an attribute, for :func:`reinit_`.
    """
    net.weight_init = weight_init  # type: ignore[assignment]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight_init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def reinit_(net: nn.Module) -> None:
    """Give the net new random weights in place, as a new net of its kind has them. Norms and their statistics too."""
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
        ValueError: if ``images`` is not ``[N, C, H, W]`` with the net's ``image_shape``.
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
        ValueError: if height or width is under ``smallest`` pixels.
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
        ValueError: if ``width`` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width is {width}, but it multiplies channel counts: choose a number above 0.")
    return tuple(scale_channels(count, width) for count in channels)


def spatial_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """Side of a map after a convolution or pooling: ``floor((size + 2 padding - kernel) / stride) + 1``."""
    return (size + 2 * padding - kernel_size) // stride + 1


class GlobalAvgPool(nn.Module):
    """Mean over pixels: ``[N, C, H, W] -> [N, C]`` (Lin et al. 2014, Network in Network, sec. 3.2).

    In training a sum is computed and then divided. The gradient is then divided before it is spread over the pixels,
    and spreading it is a view that takes no memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x.sum(dim=(2, 3)) / x.shape[2:].numel()
        return torch.mean(x, dim=(2, 3))
