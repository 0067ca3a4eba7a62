"""Crop a part of random area and proportions, and resize it: the training crops of GoogLeNet.

Going deeper with convolutions, Szegedy et al. 2014 (arXiv:1409.4842, sec. 6): "patches of the image whose size is
distributed evenly between 8% and 100% of the image area with aspect ratio constrained to the interval [3/4, 4/3]".
Our ratio is drawn log-uniformly. The crop needs the image in its original size, so it is done while decoding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

from project.data.random import BatchRandom
from project.data.transforms import check_range

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the image before resizing."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random crop: its ranges and, after :meth:`draw`, the random numbers of one image.

    Example::

        >>> import torch
        >>> from project.data import BatchRandom, RandomResizedCrop
        >>> crop = RandomResizedCrop(scale=(0.25, 1.0))
        >>> random = BatchRandom(seed=0, epoch=0, indices=torch.tensor([7, 42]))
        >>> for drawn in crop.draw(random):
        ...     left, top, right, bottom = drawn.box((640, 480))
        ...     assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480

    Args:
        scale: smallest and largest area of the crop, as a share of the image's area, in (0, 1].
        ratio: smallest and largest width / height of the crop, above 0.
        candidates: pairs of numbers in [0, 1) for area and ratio, made by :meth:`draw`. The first pair whose crop fits
            into the image is used.
        place: two numbers in [0, 1) for the left and the top edge, made by :meth:`draw`.

    Raises:
        ValueError: if a range is empty or not positive, or if an area is above 1.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    candidates: tuple[tuple[float, float], ...] = ()
    place: tuple[float, float] = (0.5, 0.5)

    num_candidates = 10

    def __post_init__(self) -> None:
        check_range("random_crop", self.scale)
        check_range("ratio", self.ratio)
        if self.scale[1] > 1:
            raise ValueError(
                f"random_crop is {self.scale}, but it is a share of the image's area: give numbers up to 1."
            )

    def draw(self, random: BatchRandom) -> Iterator["RandomResizedCrop"]:
        """Yield a crop with random numbers of its own for each image of a batch.

        Args:
            random: random numbers for each image of the batch.
        """
        candidates, places = random.uniform(self.num_candidates, 2).tolist(), random.uniform(2).tolist()
        for pairs, place in zip(candidates, places, strict=True):
            yield replace(self, candidates=tuple(tuple(pair) for pair in pairs), place=tuple(place))

    def box(self, size: tuple[int, int]) -> Box | None:
        """The part of an image to keep; ``None`` if no candidate fits into the image.

        Args:
            size: width and height of the image in pixels.
        """
        for area, ratio in self.candidates:
            area = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * size[0] * size[1]
            ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** ratio
            width, height = round(sqrt(area * ratio)), round(sqrt(area / ratio))
            if 0 < width <= size[0] and 0 < height <= size[1]:
                left = int(self.place[0] * (size[0] - width + 1))
                top = int(self.place[1] * (size[1] - height + 1))
                return left, top, left + width, top + height
        return None


def centre_box(size: tuple[int, int], target: tuple[int, int]) -> Box:
    """The largest centred part of an image of ``size`` (width, height) with the proportions of ``target``."""
    scale = min(size[0] / target[0], size[1] / target[1])
    # Rounding must not make the part larger than the image.
    width, height = (min(side, wanted * scale) for side, wanted in zip(size, target, strict=True))
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height
