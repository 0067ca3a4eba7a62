"""MNIST, Fashion-MNIST and KMNIST: 60000 + 10000 gray images of 28x28 pixels in ten classes; four IDX files each.

Gradient-based learning applied to document recognition, LeCun et al. 1998; Fashion-MNIST, Xiao et al. 2017
(arXiv:1708.07747); Deep learning for classical Japanese literature, Clanuwat et al. 2018 (arXiv:1812.01718).

The files are searched in ``<data>/<Name>/raw`` (torchvision's folder), ``<data>/<Name>``, ``<data>`` itself, and the
system's folder of data sets. If they are in none of these, they are downloaded to the first. All three data sets use
the same four file names. Files directly in ``<data>`` are therefore ignored if the checksum of their labels is that of
another of the three data sets.
"""

import logging
from pathlib import Path

from torch import Tensor

from project.data.datamodule import ImageDataModule
from project.data.sets.download import download
from project.data.sets.idx import md5, parse_idx, read_bytes
from project.frame.paths import Paths

log = logging.getLogger(__name__)


class IdxDataModule(ImageDataModule):
    """Base class of the data sets in MNIST's format; a subclass sets the checksums."""

    image_shape = (1, 28, 28)
    checksums: dict[str, str] = {}
    """MD5 checksums by file name: of the unzipped file, or of the archive if the name ends in ``.gz``."""
    system_folder = ""
    """Name of the folder, below the system's folder of data sets, that a Linux distribution's package installs."""
    package = ""
    """Name of this package."""

    def prepare_data(self) -> None:
        """Download the files that are in none of the folders.

        Raises:
            ValueError: if the download fails.
        """
        stage = self.trainer.state.fn if self.trainer is not None else None
        for train in (False,) if stage in ("test", "predict") else (True, False):
            if self.find(train) is None:
                self._download(train)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """The images ``[N, 1, 28, 28]`` uint8 and labels ``[N]`` int64 of one part of the data set.

        Args:
            train: whether to load the training images (with validation) or the test images.

        Raises:
            ValueError: if a file is missing or damaged, or if images and labels do not fit together.
        """
        paths = self.find(train)
        if paths is None:
            raise ValueError(self._missing(train))
        images, labels = (self._read(path) for path in paths)
        if images.dim() != 3 or labels.dim() != 1 or images.shape[1:] != self.image_shape[1:]:
            raise ValueError(
                f"{paths[0]} holds an array {list(images.shape)} and {paths[1].name} {list(labels.shape)}, "
                f"but {type(self).__name__} is [N, 28, 28] and [N]: delete both and download them again."
            )
        if len(images) != len(labels) or (len(labels) and int(labels.max()) >= self.num_classes):
            raise ValueError(
                f"{paths[0]} holds {len(images)} images and {paths[1].name} {len(labels)} labels up to "
                f"{int(labels.max()) if len(labels) else '-'}, which do not fit: delete both and download them again."
            )
        return images[:, None], labels.long()

    def _folders(self) -> list[Path]:
        name = type(self).__name__
        folders = [self.data_dir / name / "raw", self.data_dir / name, self.data_dir]
        return folders + ([Paths.system_datasets / self.system_folder] if self.system_folder else [])

    def find(self, train: bool) -> tuple[Path, Path] | None:
        """The file of the images and the file of the labels, from the first folder that has both."""
        for folder in self._folders():
            images, labels = (_zipped_or_not(folder / name) for name in _file_names(train))
            if images is not None and labels is not None:
                if folder != self.data_dir or not self._is_sister(labels):
                    return images, labels
                log.info("%s holds another data set under the same file names: its files are not used.", folder)
        return None

    def _is_sister(self, labels: Path) -> bool:
        sisters = [cls for cls in IdxDataModule.__subclasses__() if cls.checksums is not self.checksums]
        return any(_known_checksum(cls.checksums, labels, None) for cls in sisters)

    def _read(self, path: Path) -> Tensor:
        contents = read_bytes(path)
        values = parse_idx(contents, path)
        if _known_checksum(self.checksums, path, contents) is False:
            log.warning("%s differs from the published %s (checksum); using it as it is.", path, type(self).__name__)
        return values

    def _download(self, train: bool) -> None:
        import torchvision

        source = getattr(torchvision.datasets, type(self).__name__, None)
        if source is None:
            raise ValueError(self._missing(train))
        for file_name, checksum in source.resources:
            if Path(file_name).stem in _file_names(train):
                path = self.data_dir / type(self).__name__ / "raw" / file_name
                try:
                    download([mirror + file_name for mirror in source.mirrors], path, checksum)
                except ConnectionError as error:
                    log.info("Download failed: %s", error)
                    raise ValueError(self._missing(train)) from None

    def _missing(self, train: bool) -> str:
        name = type(self).__name__
        install = f"install them (apt-get install {self.package}), " if self.package else ""
        return (
            f"{name}'s files are missing and could not be downloaded: {install}"
            f"put {' and '.join(f'{file}.gz' for file in (*_file_names(True), *_file_names(False)))} "
            f"into {self._folders()[0]}, or name the folder that has them in data_dir or PROJECT_DATA_DIR."
        )


class MNIST(IdxDataModule):
    """MNIST: handwritten digits.

    Example::

        data:
          class_path: project.data.MNIST
          init_args: {batch_size: 128, val_fraction: 0.1}
        model:
          net: project.models.SmallInception
    """

    class_names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    mean = (0.1307,)
    std = (0.3081,)
    checksums = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }


class FashionMNIST(IdxDataModule):
    """Fashion-MNIST: clothes of an online shop. Debian and Ubuntu have it as the package ``dataset-fashion-mnist``.

    Example::

        data:
          class_path: project.data.FashionMNIST
          init_args:
            batch_size: 128
            augment:
              - class_path: project.data.PadCrop
                init_args: {padding: 2}
              - class_path: project.data.HorizontalFlip
    """

    class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    mean = (0.2860,)
    std = (0.3530,)
    checksums = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }
    system_folder = "fashion-mnist"
    package = "dataset-fashion-mnist"


class KMNIST(IdxDataModule):
    """KMNIST: handwritten cursive Japanese (Kuzushiji), one character for each row of the Hiragana.

    Example::

        data:
          class_path: project.data.KMNIST
          init_args:
            batch_size: 128
            augment:
              - class_path: project.data.RandomAffine
                init_args: {degrees: 8, translate: 0.06}
    """

    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    mean = (0.1918,)
    std = (0.3483,)
    checksums = {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    }


def _file_names(train: bool) -> tuple[str, str]:
    part = "train" if train else "t10k"
    return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"


def _zipped_or_not(path: Path) -> Path | None:
    candidates = (path, path.with_name(f"{path.name}.gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _known_checksum(checksums: dict[str, str], path: Path, contents: bytearray | None) -> bool | None:
    """Whether the file has its known checksum; ``None`` if no checksum is known.

    The checksum of the contents is compared if it is known, else that of the archive.
    """
    bare = path.name.removesuffix(".gz")
    if bare in checksums:
        return checksums[bare] == md5(read_bytes(path) if contents is None else contents)
    return checksums[path.name] == md5(path.read_bytes()) if path.name in checksums else None
