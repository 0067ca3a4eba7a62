"""Hide a rectangle of every image: random erasing and cutout.

Random erasing data augmentation, Zhong et al. 2017 (arXiv:1708.04896, sec. 3.2, algorithm 1): a rectangle of random
area and aspect ratio. The paper draws in a loop until the rectangle fits. Here ten candidates are drawn at once, and
the first that fits is used. If none fits, the image stays whole (with the paper's ranges, fewer than 1 image in 10000).
The place is uniform among those inside the image.

Improved regularization of convolutional neural networks with cutout, DeVries & Taylor 2017 (arXiv:1708.04552, sec.
3): a square whose centre lies anywhere in the image, so that the square is clipped at the border. The paper fills it
with the data set's mean, which is 0 after normalisation. Both classes here act before normalisation: to do as the paper
does, give the mean as ``value``.
"""

from math import log
from typing import Literal

import torch
from torch import Tensor

from project.data.random import BatchRandom
from project.data.transforms import BatchTransform, check_probability, check_range


class RandomErasing(BatchTransform):
    """Overwrite a rectangle of random area and shape.

    Example::

        data:
          init_args:
            augment+:
              - class_path: project.data.RandomErasing
                init_args: {p: 0.25, scale: [0.02, 0.2], value: random}

    Args:
        p: probability that an image gets a rectangle, in [0, 1].
        scale: smallest and largest area of the rectangle, as a share of the image's area, in (0, 1].
        ratio: smallest and largest height / width of the rectangle, above 0. It is drawn log-uniformly.
        value: value of the pixels written, in [0, 1], or ``"random"`` for noise (the best in the paper, but slower).

    Raises:
        ValueError: if a probability is outside [0, 1], or if a range is empty or not positive.
    """

    num_candidates = 10

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.4),
        ratio: tuple[float, float] = (0.3, 10 / 3),
        value: float | Literal["random"] = 0.0,
    ) -> None:
        super().__init__()
        check_probability("p", p)
        check_range("scale", scale)
        check_range("ratio", ratio)
        if scale[1] > 1:
            raise ValueError(f"scale is {scale}, but it is a share of the image's area: give numbers up to 1.")
        self.p, self.scale, self.ratio, self.value = p, scale, ratio, value

    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        if self.p == 0:
            return images
        height, width = images.shape[-2:]
        area, ratio = random.uniform(2, self.num_candidates).unbind(1)  # [N, num_candidates]
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * (height * width)
        ratio = torch.exp(log(self.ratio[0]) + log(self.ratio[1] / self.ratio[0]) * ratio)
        rows, columns = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (rows <= height) & (columns <= width) & (rows > 0) & (columns > 0)
        first = fits.int().argmax(1, keepdim=True)  # the position of the first True
        rows, columns = rows.gather(1, first)[:, 0], columns.gather(1, first)[:, 0]

        chosen, down, right = random.uniform(3).unbind(1)
        rows = torch.where((chosen < self.p) & fits.any(1), rows, 0)
        top, left = (down * (height - rows + 1)).floor(), (right * (width - columns + 1)).floor()
        inside = box_mask(top, top + rows, left, left + columns, height, width)
        if self.value == "random":
            return torch.where(inside, random.bytes(*images.shape[1:]).to(images.dtype) / 255, images)
        return images.masked_fill(inside, self.value)

    def extra_repr(self) -> str:
        return f"p={self.p}, scale={self.scale}, ratio={self.ratio}, value={self.value!r}"


class Cutout(BatchTransform):
    """Overwrite a square whose centre lies anywhere in the image.

    Example::

        data:
          init_args:
            augment+:
              - class_path: project.data.Cutout
                init_args: {size: 3, value: 0.3}

    Args:
        size: side of the square in pixels, 0 or more; 0 switches it off.
        p: probability that an image gets a square, in [0, 1].
        value: value of the pixels written, in [0, 1].

    Raises:
        ValueError: if the size is negative, or if the probability is outside [0, 1].
    """

    def __init__(self, size: int = 8, p: float = 1.0, value: float = 0.0) -> None:
        super().__init__()
        if size < 0:
            raise ValueError(f"size is {size}, but it counts pixels: give 0 (off) or more.")
        check_probability("p", p)
        self.size, self.p, self.value = size, p, value

    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        if self.p == 0 or self.size == 0:
            return images
        height, width = images.shape[-2:]
        chosen, down, right = random.uniform(3).unbind(1)
        top, left = (down * height).floor() - self.size // 2, (right * width).floor() - self.size // 2
        side = (chosen < self.p) * self.size
        return images.masked_fill(box_mask(top, top + side, left, left + side, height, width), self.value)

    def extra_repr(self) -> str:
        return f"size={self.size}, p={self.p}, value={self.value}"


def box_mask(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """A mask ``[N, 1, height, width]`` that is True in each image's box ``[top, bottom) x [left, right)``.

    The four edges of the boxes are tensors ``[N]``.
    """
    y = torch.arange(height, device=top.device)
    x = torch.arange(width, device=top.device)
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return (rows[:, :, None] & columns[:, None, :])[:, None]
