"""Train on blends of two images and of their labels: MixUp and CutMix.

mixup: Beyond empirical risk minimization, Zhang et al. 2018 (arXiv:1710.09412, sec. 2): x = a x_i + (1 - a) x_j, a ~
Beta(alpha, alpha). CutMix, Yun et al. 2019 (arXiv:1905.04899, sec. 3.1): a rectangle of x_j of area 1 - a pasted into
x_i.

Both papers draw one number for a batch; here each image has its own. An image's partner is the next one in an order
by hash, around a ring, so it is never the image itself and does not depend on the images' order in the batch (only on
which images are in it).

Beta(alpha, alpha) is drawn exactly from two uniforms: if T is Student-t with 2 alpha degrees of freedom, then
(1 + T / sqrt(2 alpha + T^2)) / 2 is Beta(alpha, alpha) (Devroye, Random variate generation in one line of code, 1996,
sec. 4), and T = sqrt(2 alpha (U^(-1/alpha) - 1)) cos(2 pi V) (Bailey, Polar generation of random variates with the
t-distribution, 1994).
"""

from abc import ABC, abstractmethod
from math import pi

import torch
from torch import Tensor, nn

from project.data.erasing import box_mask
from project.data.random import BatchRandom
from project.data.transforms import check_probability


class BatchMix(nn.Module, ABC):
    """Blends each image of a batch with another; labels become soft targets.

    Args:
        alpha: both parameters of the Beta distribution, > 0: 1 is uniform, smaller leaves most images nearly whole.
        p: probability for each image, in [0, 1].

    Raises:
        ValueError: for an alpha that is not positive or a probability outside [0, 1].
    """

    def __init__(self, alpha: float, p: float) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(
                f"alpha is {alpha}, but Beta(alpha, alpha) needs more than 0: leave mix out to switch it off."
            )
        check_probability("p", p)
        self.alpha, self.p = alpha, p

    def forward(self, images: Tensor, labels: Tensor, random: BatchRandom, num_classes: int) -> tuple[Tensor, Tensor]:
        """``[N, C, H, W]``, ``[N]`` -> blended ``[N, C, H, W]``, targets ``[N, num_classes]`` float that sum to 1."""
        targets = torch.zeros(len(labels), num_classes, device=labels.device)
        if self.p == 0 or len(labels) < 2:
            return images, targets.scatter_(1, labels[:, None], 1.0)
        partner = ring_partners(random)
        weight = torch.where(random.bernoulli(self.p), symmetric_beta(self.alpha, random), 1.0)
        images, weight = self.blend(images, images[partner], weight, random)
        targets.scatter_add_(1, labels[:, None], weight[:, None])
        return images, targets.scatter_add_(1, labels[partner][:, None], 1 - weight[:, None])

    @abstractmethod
    def blend(self, images: Tensor, others: Tensor, weight: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor]:
        """Keep the share ``weight`` ``[N]`` of ``images``; returns the blend and the share that was kept."""

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, p={self.p}"


class MixUp(BatchMix):
    """Weighted mean of two images (Zhang et al. 2018, eq. 1)."""

    def __init__(self, alpha: float = 0.2, p: float = 1.0) -> None:
        super().__init__(alpha, p)

    def blend(self, images: Tensor, others: Tensor, weight: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor]:
        return torch.lerp(images, others, (1 - weight)[:, None, None, None].to(images.dtype)), weight


class CutMix(BatchMix):
    """A rectangle of the other image, with this image's proportions (Yun et al. 2019, eq. 1 and 2).

    The rectangle's centre lies anywhere, so it is clipped at the border; the targets weigh the pixels really taken.
    """

    def __init__(self, alpha: float = 1.0, p: float = 1.0) -> None:
        super().__init__(alpha, p)

    def blend(self, images: Tensor, others: Tensor, weight: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        side = (1 - weight).sqrt()
        down, right = random.uniform(2).unbind(1)
        top, bottom = _clip(down, side, height)
        left, right = _clip(right, side, width)
        taken = (bottom - top) * (right - left) / (height * width)
        return torch.where(box_mask(top, bottom, left, right, height, width), others, images), 1 - taken


def symmetric_beta(alpha: float, random: BatchRandom) -> Tensor:
    """A number in [0, 1] for each image from Beta(alpha, alpha), ``[N]`` float32, by the formula above."""
    u, v = random.uniform(2).unbind(1)
    cosine = torch.cos(2 * pi * v)
    # U in (0, 1]; expm1 keeps the digits of U^(-1/alpha) - 1 for large alpha. Infinity (small alpha) gives 0 or 1.
    squared = torch.expm1(torch.log1p(-u) * (-1 / alpha)) * cosine.square()
    return 0.5 + 0.5 * torch.sign(cosine) / torch.sqrt(1 + 1 / squared)


def ring_partners(random: BatchRandom) -> Tensor:
    """For each image the position of another one, ``[N]`` int64: a permutation with no fixed point."""
    order = random.permutation()
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


def _clip(centre: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ends of an interval of length ``side * size``, rounded, about ``floor(centre * size)``, cut to [0, size]."""
    length, middle = (side * size).round(), (centre * size).floor()
    start = middle - (length / 2).floor()
    return start.clamp(min=0), (start + length).clamp(max=size)
