"""Any folder of class folders as a data set: gray or colour images of mixed sizes.

::

    root/train/<class>/*.png   root/val/<class>/*.png   root/test/<class>/*.png
    root/<class>/*.png

The parts may also be called ``training``, ``valid``, ``validation`` and ``testing``, in small or capital letters.
Without ``val``, a stratified share of the training images is held out for validation. Without ``test``, the folder
``val`` is the test set (as for ImageNet, whose test labels are not public). Without both, a stratified share of the
images is held out for test, with a constant seed. A data set that fits in memory is decoded once into one uint8 tensor.
A larger one is decoded by the loader's workers, batch by batch.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from project.data.array_dataset import ArrayDataset, BatchDataset
from project.data.datamodule import ImageDataModule
from project.data.image_files import ImageFiles, OnCorrupt
from project.data.image_paths import beside, find_classes, find_parts, folders, search, tell_left_out
from project.data.random_resized_crop import RandomResizedCrop
from project.data.split import check_fraction, stratified_split

log = logging.getLogger(__name__)

_STATISTICS = {
    # Mean and std of ImageNet; for gray, their means over the channels. Roughly right numbers are enough for a net.
    1: ((0.449,), (0.226,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class ImageFolder(ImageDataModule):
    """Images that are sorted into one folder per class. ``configs/image_folder.yaml`` is a complete configuration.

    Example::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from project.data import ImageFolder
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         Path(root, name).mkdir()
        ...         Image.new("RGB", (80, 60)).save(Path(root, name, "1.jpg"))
        ...     data = ImageFolder(root, image_size=32, batch_size=64)
        >>> data.class_names, data.image_shape
        (('cat', 'dog'), (3, 32, 32))

    Args:
        root: folder of the images. A relative path is searched in the working directory, then in the data folder.
        image_size: side in pixels of the square images that the net gets, at least 1. The shorter side of a file is
            resized to it, and the centre is cropped.
        channels: number of channels that files are converted to: 3 (RGB) or 1 (gray).
        on_corrupt: treatment of a file that cannot be decoded: ``"error"`` raises an error, ``"skip"`` leaves the file
            out and logs a warning.
        in_memory: whether all images are decoded once and kept in memory, or batch by batch in the workers. ``None``
            decides by ``memory_limit_mb``.
        memory_limit_mb: largest size in MB of decoded images that are kept in memory, 0 or more.
        random_crop: smallest and largest area of random crops of the training images, as a share of the image's area,
            in (0, 1]; GoogLeNet has 0.08 and 1.0. The images are then decoded batch by batch. ``None`` crops the
            centre.
        test_fraction: share of the images that is held out for test if there is no folder for it, in [0, 1).
        mean, std: mean and standard deviation of each channel, for pixels in [0, 1]. ``None`` takes those of ImageNet.
        kwargs: other arguments of :class:`~project.data.datamodule.ImageDataModule`, such as ``batch_size``.

    Raises:
        ValueError: if the folder is missing, if it has fewer than two class folders, or if a number is outside its
            range.
    """

    test_seed = 1797

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        channels: Literal[1, 3] = 3,
        on_corrupt: OnCorrupt = "error",
        in_memory: bool | None = None,
        memory_limit_mb: float = 2048.0,
        random_crop: tuple[float, float] | None = None,
        test_fraction: float = 0.2,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}, but it counts pixels: give 1 or more.")
        if channels not in _STATISTICS:
            raise ValueError(f"channels is {channels}, but files are decoded to 1 (gray) or 3 (RGB): give one of them.")
        check_fraction("test_fraction", test_fraction)
        if in_memory and random_crop is not None:
            raise ValueError("in_memory is true, but random_crop needs images of their own size: leave one out.")
        for name, value in (("mean", mean), ("std", std)):
            if value is not None and len(value) != channels:
                raise ValueError(f"{name} is {value}, but the images have {channels} channels: give as many numbers.")
        self.random_crop = None if random_crop is None else RandomResizedCrop((random_crop[0], random_crop[1]))
        self.root = self._find_root(root)
        self.image_shape = (channels, image_size, image_size)
        self.mean, self.std = mean or _STATISTICS[channels][0], std or _STATISTICS[channels][1]
        self.on_corrupt, self.in_memory, self.memory_limit_mb = on_corrupt, in_memory, memory_limit_mb
        self.test_fraction = test_fraction
        self.parts = find_parts(self.root)
        self.class_names = find_classes(self.parts["train"])
        self._listed: dict[str, tuple[list[Path], Tensor]] = {}

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """The images ``[N, C, H, W]`` uint8 and labels ``[N]`` int64 of one part, all decoded.

        Args:
            train: whether to load the training images (with validation) or the test images.
        """
        return self._decode_all(self._files(train))

    def load_dataset(self, train: bool) -> BatchDataset:
        """One part of the data set, in memory or as files that are decoded batch by batch.

        Args:
            train: whether to load the training images (with validation) or the test images.

        Raises:
            ValueError: if a class folder is empty, if training does not have this class, or if a file is corrupt (see
                ``on_corrupt``).
        """
        return self._dataset(self._files(train))

    def split(self, dataset: BatchDataset) -> tuple[BatchDataset, BatchDataset]:
        """The parts for training and for validation. Only the training part gets random crops.

        Args:
            dataset: all training images, as :meth:`load_dataset` returned them.
        """
        if "val" in self.parts and "test" in self.parts:
            train, val = dataset, self._dataset(self._list("val"))
        else:
            train, val = super().split(dataset)
        if isinstance(train, ImageFiles) and isinstance(val, ImageFiles):
            train.random_crop = self.random_crop
        return train, val

    def count_test_images(self) -> int:
        """The number of test files. No file is decoded."""
        return len(self._files(train=False))

    def _dataset(self, files: ImageFiles) -> BatchDataset:
        size_mb = len(files) * torch.Size(self.image_shape).numel() / 1e6
        fits = self.random_crop is None and size_mb <= self.memory_limit_mb
        return ArrayDataset(*self._decode_all(files)) if (fits if self.in_memory is None else self.in_memory) else files

    def _files(self, train: bool) -> ImageFiles:
        """The files for training and validation, or those for test."""
        for part in ("test", "val"):
            if part in self.parts:
                return self._list("train" if train else part)
        files = self._list("train")
        chosen = stratified_split(files.labels, self.test_fraction, self.test_seed)[0 if train else 1]
        paths = [files.paths[index] for index in chosen.tolist()]
        return self._image_files(paths, files.labels[chosen])

    def _list(self, part: str) -> ImageFiles:
        """The files of a part with their labels. The folders are read once."""
        if part not in self._listed:
            self._listed[part] = self._read(part)
        return self._image_files(*self._listed[part])

    def _read(self, part: str) -> tuple[list[Path], Tensor]:
        paths: list[Path] = []
        others: list[Path] = []
        labels: list[int] = []
        classes = folders(self.parts[part])
        for folder in classes:
            if folder.name not in self.class_names:
                raise ValueError(f"{folder} is a class that {self.parts['train']} does not have: add or remove it.")
            found, left_out = search(folder)
            if not found:
                raise ValueError(f"{folder} holds no images: put images of this class in it, or remove the folder.")
            paths += found
            others += left_out
            labels += [self.class_names.index(folder.name)] * len(found)
        if not paths:
            raise ValueError(f"{self.parts[part]} holds no class folders: sort its images into them, or remove it.")
        for folder in {self.parts[part], self.root} if part == "train" else {self.parts[part]}:
            others += beside(folder, {*classes, *self.parts.values()})
        tell_left_out(self.root, others)
        return paths, torch.tensor(labels)

    def _image_files(self, paths: list[Path], labels: Tensor) -> ImageFiles:
        return ImageFiles(paths, self.image_shape, labels, on_corrupt=self.on_corrupt, seed=self.run_seed)

    def _decode_all(self, files: ImageFiles) -> tuple[Tensor, Tensor]:
        """Decode all files, in threads. Processes would not be faster, because the decoders release Python's lock."""
        log.info("Decoding %d images of %s", len(files), self.root)
        parts = files.indices.split(64)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = list(pool.map(files.decode, parts))
        images, kept = (torch.cat(tensors) for tensors in zip(*decoded, strict=True))
        return images, files.all_labels[kept]

    def _find_root(self, root: str) -> Path:
        for path in (Path(root), self.data_dir / root):
            if path.is_dir():
                return path
        raise ValueError(f"root is {root!r}, but no such folder is here or in {self.data_dir}: name another folder.")
