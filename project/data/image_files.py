"""Image files of any size and mode, decoded to one shape: for large folders, and for prediction on your own images.

An image is rotated as its EXIF data say and converted to gray or RGB. Then the largest centred part with the wanted
proportions is resized to the wanted shape (bilinear with antialiasing). This is the same as resizing the shorter side
and then cropping the centre, in one step.

Transparent images are laid on gray. Gray images of more than 8 bits are read as if white were 255, 4095 or 65535 (for
floats 1, 255 or 65535): the lowest of these that is at least the largest pixel. Other ranges, and those with negative
values, are stretched from the smallest to the largest pixel. PGM and JPEG 2000 files say themselves what is white.
"""

import logging
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from project.data.array_dataset import Batch, BatchDataset
from project.data.random import DECODE, BatchRandom
from project.data.random_resized_crop import Box, RandomResizedCrop, centre_box

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_PLUGINS = {".heic": "pillow_heif", ".heif": "pillow_heif", ".hif": "pillow_heif", ".jxl": "pillow_jxl"}
BACKGROUND = (128, 128, 128, 255)
"""The colour behind transparent pixels. Gray shows both white and black drawings."""
_MAX_PIXELS = 1 << 27
"""Largest number of pixels of a file, about 16000 by 8000. A small file may claim any number."""
_RUN_PROGRAMS = ("EPS", "WMF")
"""Formats that Pillow decodes with another program."""
OnCorrupt = Literal["error", "skip"]


class CorruptImageError(ValueError):
    """Raised for a file that cannot be decoded.

    A loader's worker puts the traceback into the message of an exception. Only the last line, the sentence, is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.CorruptImageError: "))


class ImageFiles(BatchDataset):
    """Image files that are decoded when a batch asks for them.

    Example::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from project.data import ImageFiles, find_images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30)).save(Path(folder, "cat.png"))
        ...     images, labels, _ = ImageFiles(find_images(folder), image_shape=(1, 28, 28)).__getitems__([0])
        >>> images.shape, labels
        (torch.Size([1, 1, 28, 28]), tensor([-1]))

    Args:
        paths: paths of all files of the data set.
        image_shape: shape (channels, height, width) of the decoded images; 1 or 3 channels.
        labels: labels of all files, ``[N]`` int64. ``None`` gives every file the label -1, which means unknown.
        indices: indices of the files that belong to this part, in the order of the part. ``None`` takes all files.
        on_corrupt: treatment of a file that cannot be decoded: ``"error"`` raises an error, ``"skip"`` leaves the file
            out of its batch and logs a warning, ``"mark"`` takes a black image, logs a warning and notes the file in
            ``unreadable``.
        random_crop: random crop of each image, which depends on (seed, epoch, file). ``None`` crops the centre.
        seed: seed of the random crops; any int.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        image_shape: tuple[int, int, int],
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        on_corrupt: OnCorrupt | Literal["mark"] = "error",
        random_crop: RandomResizedCrop | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(torch.full((len(paths),), -1) if labels is None else labels, indices)
        self.paths = paths
        self.image_shape = image_shape
        self.on_corrupt = on_corrupt
        self.random_crop = random_crop
        self.seed = seed
        self.unreadable: dict[int, str] = {}
        """The indices of the files that this process has marked, and what is wrong with them."""
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see the new epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the random crops depend on.

        Args:
            epoch: number of the epoch that begins, 0 or more.
        """
        self._epoch.fill_(epoch)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        images, indices = self.decode(self.indices[torch.as_tensor(positions, dtype=torch.int64)])
        return images, self.all_labels[indices], indices

    def images_at(self, indices: Tensor) -> Tensor:
        """The decoded images ``[N, C, H, W]`` uint8, without the files that were skipped.

        Args:
            indices: indices of the files in the whole data set, ``[N]`` int64.
        """
        return self.decode(indices)[0]

    def decode(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The decoded images ``[N, C, H, W]`` uint8 and their indices ``[N]``, without the files that were skipped.

        Args:
            indices: indices of the files in the whole data set, int64 of one dimension.
        """
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
                if self.on_corrupt == "skip":
                    continue
                self.unreadable[index] = str(error)
                images.append(torch.zeros(self.image_shape, dtype=torch.uint8))
            kept.append(index)
        stacked = torch.stack(images) if images else torch.empty((0, *self.image_shape), dtype=torch.uint8)
        return stacked, torch.tensor(kept, dtype=torch.int64)


def decode_image(
    path: str | os.PathLike[str], image_shape: tuple[int, int, int], crop: RandomResizedCrop | None = None
) -> Tensor:
    """Read an image file as ``[C, H, W]`` uint8.

    Args:
        path: path of the image file.
        image_shape: shape (channels, height, width) of the result; 1 or 3 channels.
        crop: drawn crop, one of those that :meth:`RandomResizedCrop.draw` gives. ``None`` crops the centre.

    Raises:
        ValueError: if the file is missing, truncated or no image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = image_shape
    if channels not in (1, 3):
        raise ValueError(f"image_shape is {image_shape}, but give 1 (gray) or 3 (RGB) channels, as files can have.")
    try:
        if plugin := _PLUGINS.get(Path(path).suffix.lower()):
            getattr(import_module(plugin), "register_heif_opener", list)()  # the other plugin needs no call
        with Image.open(path) as file:
            if file.width * file.height > _MAX_PIXELS or file.format in _RUN_PROGRAMS:
                raise ValueError(f"{file.format}, {file.width} x {file.height} pixels, is more than is read")
            declares_range = file.format in ("PPM", "JPEG2000")  # Pillow makes 16 bits of them
            image = _as_mode(ImageOps.exif_transpose(file), "L" if channels == 1 else "RGB", declares_range)
    except FileNotFoundError:
        raise CorruptImageError(f"{os.fspath(path)} does not exist: name an image file.") from None
    except Exception as error:  # the decoders raise nearly any exception for bad bytes
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


def _as_mode(image: "Image", mode: str, declares_range: bool) -> "Image":
    from PIL import Image

    if image.mode[0] in "IF":  # 16 or 32 bits, or floats; convert() would clip them
        image = _to_eight_bits(image, declares_range)
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image.convert("RGBA"))
    return image.convert(mode)


def _to_eight_bits(image: "Image", declares_range: bool) -> "Image":
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    if not np.isfinite(high - low):
        raise ValueError("it has pixels that are not finite")
    scales = {1: 255.0, 255: 1.0, 65535: 255 / 65535} if image.mode == "F" else {255: 1.0, 4095: 2**-4, 65535: 2**-8}
    fits = [scale for white, scale in scales.items() if low >= 0 and high <= white]
    if not fits:
        pixels, fits = pixels - low, [255 / max(high - low, 1e-300)]
    return Image.fromarray((pixels * fits[-1 if declares_range else 0] + 1e-6).astype(np.uint8))
