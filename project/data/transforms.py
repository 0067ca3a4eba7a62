"""Augmentations of a whole batch, with random numbers of its own for every image, and normalisation.

The augmentations here are pad-and-crop, flip and affine maps. Each takes images ``[N, C, H, W]`` float in [0, 1] on any
device and a :class:`~project.data.random.BatchRandom`. It returns the same shape and never writes into its input. With
zero strength it returns the same bits.

Pad-and-crop and flip as in Deep residual learning, He et al. 2015 (arXiv:1512.03385, sec. 4.2); affine maps as in
Best practices for convolutional neural networks, Simard et al. 2003 (sec. 2).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import pi
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from project.data.random import BatchRandom


class BatchTransform(nn.Module, ABC):
    """Base class of augmentations. A subclass implements ``forward`` and draws random numbers for each image.

    Example::

        >>> import torch
        >>> from project.data import BatchRandom, BatchTransform
        >>> class Brightness(BatchTransform):
        ...     def forward(self, images, random):
        ...         factor = 0.8 + 0.4 * random.uniform()[:, None, None, None]
        ...         return (images * factor).clamp(0, 1)
        >>> Brightness()(torch.ones(2, 1, 8, 8), BatchRandom(0, 0, indices=torch.arange(2))).shape
        torch.Size([2, 1, 8, 8])
    """

    @abstractmethod
    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        """Images ``[N, C, H, W]`` float in [0, 1] -> augmented images of the same shape."""


class PadCrop(BatchTransform):
    """Pad by ``padding`` pixels on every side, then crop the old size at a random place: a shift by whole pixels.

    Example::

        data:
          init_args:
            augment:
              - class_path: project.data.PadCrop
                init_args: {padding: 1, mode: reflect}

    Args:
        padding: largest shift in pixels, 0 or more; 0 switches it off.
        mode: content of the padding: ``"zeros"`` is black, ``"reflect"`` is the image mirrored without its edge.

    Raises:
        ValueError: if the padding is negative, or if the mode is unknown.
    """

    def __init__(self, padding: int = 4, mode: Literal["zeros", "reflect"] = "zeros") -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"padding is {padding}, but it counts pixels: give 0 (no shift) or more.")
        if mode not in ("zeros", "reflect"):
            raise ValueError(f"mode is {mode!r}, but PadCrop knows 'zeros' and 'reflect': give one of them.")
        self.padding = padding
        self.mode = mode

    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        if self.padding == 0:
            return images
        top, left = random.integers(0, 2 * self.padding + 1, 2).unbind(1)
        padded = F.pad(images, [self.padding] * 4, mode="constant" if self.mode == "zeros" else "reflect")
        return crop(padded, top, left, images.shape[-2:])

    def extra_repr(self) -> str:
        return f"padding={self.padding}, mode={self.mode!r}"


class HorizontalFlip(BatchTransform):
    """Mirror left and right.

    Example::

        data:
          init_args:
            augment+:
              - class_path: project.data.HorizontalFlip
                init_args: {p: 0.5}

    Args:
        p: probability that an image is mirrored, in [0, 1].

    Raises:
        ValueError: if the probability is outside [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_probability("p", p)
        self.p = p

    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        if self.p == 0:
            return images
        return torch.where(random.bernoulli(self.p)[:, None, None, None], images.flip(-1), images)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class RandomAffine(BatchTransform):
    """Shear, scale and rotate around the centre, then shift. Interpolation is bilinear; shifts are not whole pixels.

    The order is that of torchvision's ``RandomAffine``, so the shift does not depend on the scale.

    Example::

        data:
          init_args:
            augment:
              - class_path: project.data.RandomAffine
                init_args: {degrees: 10, translate: 0.08, scale: [0.9, 1.1], shear: 5}

    Args:
        degrees: largest rotation to either side in degrees, 0 or more.
        translate: largest shift to either side as a share of the image's side, 0 or more.
        scale: smallest and largest factor on the size, above 0; (1, 1) keeps the size.
        shear: largest angle of the horizontal shear to either side in degrees, in [0, 90).
        padding_mode: content of the pixels from outside the image: ``"zeros"`` is black, ``"border"`` is the nearest
            pixel of the edge, ``"reflection"`` is the image mirrored.

    Raises:
        ValueError: if a number is outside its range, or if the smallest factor is above the largest.
    """

    def __init__(
        self,
        degrees: float = 0.0,
        translate: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        shear: float = 0.0,
        padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
    ) -> None:
        super().__init__()
        for name, value in (("degrees", degrees), ("translate", translate), ("shear", shear)):
            if value < 0:
                raise ValueError(
                    f"{name} is {value}, but it is the largest change to either side: give 0 (none) or more."
                )
        if shear >= 90:
            raise ValueError(f"shear is {shear}, but a shear of 90 degrees leaves no image: give less than 90.")
        check_range("scale", scale)
        self.degrees, self.translate, self.scale, self.shear = degrees, translate, (scale[0], scale[1]), shear
        self.padding_mode = padding_mode

    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        if not (self.degrees or self.translate or self.shear) and self.scale == (1.0, 1.0):
            return images
        grid = _affine_grid(self._matrices(random, images.shape[-2:]), images.shape[-2:])
        return F.grid_sample(images, grid.to(images.dtype), "bilinear", self.padding_mode, align_corners=False)

    def _matrices(self, random: BatchRandom, size: torch.Size) -> Tensor:
        """Maps from the output's to the input's coordinates, which are in [-1, 1]: ``[N, 2, 3]``."""
        angle, shear, right, down, factor = random.uniform(5).unbind(1)
        angle = (2 * angle - 1) * (self.degrees * pi / 180)
        shear = torch.tan((2 * shear - 1) * (self.shear * pi / 180))
        low, high = self.scale
        factor = 1 / (low + (high - low) * factor)  # the map goes backwards, from output to input
        cos, sin = torch.cos(angle) * factor, torch.sin(angle) * factor
        # A unit of x and one of y are different numbers of pixels. `aspect` makes it a rotation of the pixels.
        aspect = size[1] / size[0]
        a, b, c, d = cos + shear * sin, (shear * cos - sin) / aspect, sin * aspect, cos
        # The shift comes last, so the map back begins with it. A side is 2 long in these coordinates.
        right, down = (2 * self.translate * (2 * right - 1)), (2 * self.translate * (2 * down - 1))
        return torch.stack([a, b, a * right + b * down, c, d, c * right + d * down], dim=1).view(-1, 2, 3)

    def extra_repr(self) -> str:
        return f"degrees={self.degrees}, translate={self.translate}, scale={self.scale}, shear={self.shear}"


class Normalize(nn.Module):
    """Normalise each channel to zero mean and unit variance: ``(x - mean) / std``.

    Example::

        >>> import torch
        >>> from project.data import Normalize
        >>> normalize = Normalize(mean=[0.5], std=[0.25])
        >>> normalize(torch.tensor([0.25, 0.5, 1.0]).view(1, 1, 1, 3)).flatten()
        tensor([-1.,  0.,  2.])

    Args:
        mean: mean of each channel, one number per channel, for pixels in [0, 1].
        std: standard deviation of each channel, one number above 0 per channel, for pixels in [0, 1].

    Raises:
        ValueError: if a std is not positive, or if there are not as many stds as means.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(
                f"mean is {tuple(mean)} and std {tuple(std)}, but each channel needs one of both and std > 0: "
                "give as many numbers as the images have channels."
            )
        scale = 1 / torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", scale.float().view(-1, 1, 1), persistent=False)
        shift = -torch.tensor(mean, dtype=torch.float64) * scale
        self.register_buffer("shift", shift.float().view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images, self.scale)  # type: ignore[arg-type]


def crop(images: Tensor, top: Tensor, left: Tensor, size: Sequence[int]) -> Tensor:
    """Crop ``[N, C, *size]`` out of images ``[N, C, H, W]``. ``top`` and ``left`` ``[N]`` are each image's corner.

    A row of the output is a run of consecutive values in memory. Gathering whole runs is 2x faster than gathering
    pixels.
    """
    num, channels, height, width = images.shape
    images = images.contiguous()
    rows = torch.arange(size[0], device=images.device)
    planes = torch.arange(num * channels, device=images.device).view(num, channels, 1) * (height * width)
    starts = planes + ((top * width + left)[:, None] + rows * width)[:, None]  # place of each run, [N, C, size[0]]
    # A view without a copy: its row i holds the size[1] values that begin at place i; the rows overlap.
    runs = images.as_strided((images.numel() - size[1] + 1, size[1]), (1, 1), images.storage_offset())
    return runs[starts.view(-1)].view(num, channels, *size)


def _affine_grid(theta: Tensor, size: torch.Size) -> Tensor:
    """``torch.nn.functional.affine_grid`` by broadcasting, ``[N, H, W, 2]``.

    x and y are computed as two planes ``[N, 2, H, W]``, which a CPU fills 5x faster than pairs.
    """
    # x and y are the centres of the pixels in [-1, 1].
    y, x = (torch.arange(0.5, side, device=theta.device) * (2 / side) - 1 for side in size)
    along_rows = theta[:, :, :1] * x + theta[:, :, 2:]  # [N, 2, W]
    along_columns = theta[:, :, 1:2] * y  # [N, 2, H]
    return (along_columns[:, :, :, None] + along_rows[:, :, None]).permute(0, 2, 3, 1)


def check_probability(name: str, value: float) -> None:
    """Raise a ``ValueError`` if a value is no probability."""
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name} is {value}, but a probability lies in [0, 1]: 0 switches it off, 1 takes every image."
        )


def check_range(name: str, value: tuple[float, float]) -> None:
    """Raise a ``ValueError`` if a range is empty or not positive."""
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} is {value}, but it is a range of positive numbers: give (smallest, largest).")
