"""Image files of any size and mode, decoded to one shape: for large folders, and to predict on one's own images.

Reading: rotated as the camera says, gray or RGB, the largest centred part with the wished proportions, resized to the
wished shape (bilinear with antialiasing): the same as resizing the shorter side and cropping the centre, in one step.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from project.data.array_dataset import Batch, BatchDataset
from project.data.random import DECODE, BatchRandom
from project.data.random_resized_crop import Box, RandomResizedCrop, centre_box

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
OnCorrupt = Literal["error", "skip"]


class CorruptImageError(ValueError):
    """A file that cannot be decoded.

    A loader's worker hands exceptions over with their traceback in the message; only the last line, the sentence, is
    kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.CorruptImageError: "))


class ImageFiles(BatchDataset):
    """Image files decoded when they are asked for.

    Args:
        paths: the files.
        image_shape: channels (1 or 3), height, width of what they are decoded to.
        labels: ``[N]`` int64; ``None`` gives -1, unknown.
        indices: which of the files belong to this part; ``None`` takes all.
        on_corrupt: refuse a file that cannot be decoded, or leave it out of its batch with a warning.
        random_crop: crop at random, depending on (seed, epoch, file); ``None`` crops the centre.
        seed: the run's seed.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_shape: tuple[int, int, int],
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        on_corrupt: OnCorrupt = "error",
        random_crop: RandomResizedCrop | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(torch.full((len(paths),), -1) if labels is None else labels, indices)
        self.paths = paths
        self.image_shape = image_shape
        self.on_corrupt = on_corrupt
        self.random_crop = random_crop
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        images, indices = self.decode(self.indices[torch.as_tensor(positions)])
        return images, self.all_labels[indices], indices

    def images_at(self, indices: Tensor) -> Tensor:
        return self.decode(indices)[0]

    def decode(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[N, C, H, W]`` uint8 and their indices ``[N]``, without those that were skipped."""
        crops: list[RandomResizedCrop | None] = [None] * len(indices)
        if self.random_crop is not None:
            crops = list(self.random_crop.draw(BatchRandom(self.seed, int(self._epoch), indices, DECODE)))
        images, kept = [], []
        for index, crop in zip(indices.tolist(), crops, strict=True):
            try:
                images.append(decode_image(self.paths[index], self.image_shape, crop))
            except CorruptImageError as error:
                if self.on_corrupt == "error":
                    raise
                log.warning("Skipped: %s", error)
            else:
                kept.append(index)
        stacked = torch.stack(images) if images else torch.empty((0, *self.image_shape), dtype=torch.uint8)
        return stacked, torch.tensor(kept, dtype=torch.int64)

    def subset(self, positions: Tensor) -> Self:
        return type(self)(
            self.paths,
            self.image_shape,
            self.all_labels,
            self.indices[positions],
            on_corrupt=self.on_corrupt,
            random_crop=self.random_crop,
            seed=self.seed,
        )


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """The image file ``path``, or all image files in the folder ``path`` and below, sorted.

    Raises:
        ValueError: when there is no such path, or no image.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: name an image file or a folder of them.")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"{path} holds no images: put files in it that end in {', '.join(SUFFIXES)}.")
    return found


def decode_image(
    path: str | os.PathLike[str], image_shape: tuple[int, int, int], crop: RandomResizedCrop | None = None
) -> Tensor:
    """Read an image file as ``[C, H, W]`` uint8.

    Args:
        path: the file.
        image_shape: channels (1 or 3), height, width.
        crop: where to crop; ``None`` takes the centre.

    Raises:
        ValueError: when the file is missing, truncated or no image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    if channels not in (1, 3):
        raise ValueError(
            f"image_shape is {image_shape}, but files are decoded to 1 (gray) or 3 (RGB) channels: give one of them."
        )
    try:
        with Image.open(path) as file:
            image = _as_mode(ImageOps.exif_transpose(file), "L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(path)} does not exist: name an image file.") from None
    except Exception as error:  # the decoders raise nearly anything on bad bytes
        reason = " ".join(str(error).split())
        raise CorruptImageError(
            f"{os.fspath(path)} is truncated or no image ({reason}): replace or remove it "
            "(a data set skips such files with on_corrupt: skip)."
        ) from None
    box: Box = centre_box(image.size, (width, height))
    if crop is not None:
        box = crop.box(image.size) or box
    if image.size != (width, height) or box != (0, 0, width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, box)
    pixels = torch.from_numpy(np.array(image))
    return pixels.view(height, width, channels).permute(2, 0, 1).contiguous()


def _as_mode(image: "Image", mode: str) -> "Image":
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits: keep the upper 8, where convert() would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
