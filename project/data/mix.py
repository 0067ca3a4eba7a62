"""Train on blends of two images and of their labels: MixUp and CutMix.

mixup: Beyond empirical risk minimization, Zhang et al. 2018 (arXiv:1710.09412, sec. 2): x = a x_i + (1 - a) x_j, a ~
Beta(alpha, alpha). CutMix, Yun et al. 2019 (arXiv:1905.04899, sec. 3.1): a rectangle of x_j, of area 1 - a, is pasted
into x_i.

Both papers draw one number for a batch; here each image has its own. The images of a batch are sorted by a hash and
stand on a ring; an image's partner is the next one on the ring. So the partner is never the image itself, and it
depends only on which images are in the batch, not on their order.

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
    """Base class of mixes, which blend each image of a batch with another one. Labels become soft targets.

    A subclass implements :meth:`blend`.

    Example::

        >>> import torch
        >>> from project.data import BatchMix, BatchRandom
        >>> class LeftAndRight(BatchMix):  # the right side comes from the other image
        ...     def blend(self, images, others, weight, random):
        ...         kept = torch.arange(images.shape[-1]) < (weight * images.shape[-1]).round()[:, None]
        ...         return torch.where(kept[:, None, None], images, others), kept.float().mean(dim=1)
        >>> mix, random = LeftAndRight(alpha=1.0, p=1.0), BatchRandom(0, 0, indices=torch.arange(4))
        >>> images, targets = mix(torch.rand(4, 1, 8, 8), torch.arange(4), random, num_classes=10)
        >>> targets.sum(dim=1)
        tensor([1., 1., 1., 1.])

    Args:
        alpha: both parameters of the Beta distribution, above 0. 1 is the uniform distribution; a smaller number leaves
            most images nearly whole.
        p: probability that an image is mixed, in [0, 1].

    Raises:
        ValueError: if alpha is not positive, or if the probability is outside [0, 1].
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
        """Mix images ``[N, C, H, W]`` with labels ``[N]``. The targets ``[N, num_classes]`` of an image sum to 1."""
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
        """Blend two batches. Returns the blended images ``[N, C, H, W]`` and the share ``[N]`` that was really kept.

        Args:
            images: images to keep a share of, ``[N, C, H, W]``.
            others: the partner of each image, ``[N, C, H, W]``.
            weight: share of each image to keep, ``[N]`` in [0, 1].
            random: random numbers for each image of the batch.
        """

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, p={self.p}"


class MixUp(BatchMix):
    """Weighted mean of two images (Zhang et al. 2018, eq. 1).

    Example::

        data:
          init_args:
            mix:
              class_path: project.data.MixUp
              init_args: {alpha: 0.2}

    Args:
        alpha: both parameters of the Beta distribution that the weight is drawn from, above 0.
        p: probability that an image is mixed, in [0, 1].
    """

    def __init__(self, alpha: float = 0.2, p: float = 1.0) -> None:
        super().__init__(alpha, p)

    def blend(self, images: Tensor, others: Tensor, weight: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor]:
        """``weight * images + (1 - weight) * others``, and the weight.

        Args:
            images: images to keep a share of, ``[N, C, H, W]``.
            others: the partner of each image, ``[N, C, H, W]``.
            weight: weight of each image, ``[N]`` in [0, 1].
            random: random numbers for each image; not used.
        """
        return torch.lerp(images, others, (1 - weight)[:, None, None, None].to(images.dtype)), weight


class CutMix(BatchMix):
    """Paste a rectangle of the other image, with the proportions of the image (Yun et al. 2019, eq. 1 and 2).

    The rectangle's centre lies anywhere in the image, so the rectangle is clipped at the border. The targets count the
    pixels that were really taken.

    Example::

        data:
          init_args:
            mix:
              class_path: project.data.CutMix
              init_args: {alpha: 1.0, p: 0.5}

    Args:
        alpha: both parameters of the Beta distribution that the kept area is drawn from, above 0.
        p: probability that an image is mixed, in [0, 1].
    """

    def __init__(self, alpha: float = 1.0, p: float = 1.0) -> None:
        super().__init__(alpha, p)

    def blend(self, images: Tensor, others: Tensor, weight: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor]:
        """Paste a rectangle of ``others`` into ``images``.

        Args:
            images: images that get a rectangle, ``[N, C, H, W]``.
            others: the partner of each image, ``[N, C, H, W]``.
            weight: share of each image's area to keep, ``[N]`` in [0, 1], before the rectangle is clipped.
            random: random numbers for each image, which give the rectangle's centre.
        """
        height, width = images.shape[-2:]
        side = (1 - weight).sqrt()  # of the rectangle, as a share of the image's side
        down, right = random.uniform(2).unbind(1)
        top, bottom = _clip(down, side, height)
        left, right = _clip(right, side, width)
        taken = (bottom - top) * (right - left) / (height * width)
        return torch.where(box_mask(top, bottom, left, right, height, width), others, images), 1 - taken


def symmetric_beta(alpha: float, random: BatchRandom) -> Tensor:
    """A number in [0, 1] for each image from Beta(alpha, alpha), ``[N]`` float32, by the formula of this module."""
    u, v = random.uniform(2).unbind(1)
    cosine = torch.cos(2 * pi * v)
    # squared = T^2 / (2 alpha), with U = 1 - u in (0, 1]. expm1 keeps the digits of U^(-1/alpha) - 1 for a large alpha.
    # For a small alpha the value may be infinite; the result is then 0 or 1.
    squared = torch.expm1(torch.log1p(-u) * (-1 / alpha)) * cosine.square()
    return 0.5 + 0.5 * torch.sign(cosine) / torch.sqrt(1 + 1 / squared)


def ring_partners(random: BatchRandom) -> Tensor:
    """For each image the position of its partner, ``[N]`` int64: a permutation without a fixed point."""
    order = random.permutation()
    # The partner of image order[k] is image order[k + 1], and the last one's is the first.
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


def _clip(centre: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two ends of an interval of length ``round(side * size)`` around ``floor(centre * size)``, cut to [0, size].

    ``centre`` and ``side`` are shares of ``size``, ``[N]`` each.
    """
    length, middle = (side * size).round(), (centre * size).floor()
    start = middle - (length / 2).floor()
    return start.clamp(min=0), (start + length).clamp(max=size)
