"""CIFAR-10 and CIFAR-100: 50000 + 10000 colour images of 32x32 pixels in 10 or 100 classes, as Python pickles.

Learning multiple layers of features from tiny images, Krizhevsky 2009 (https://www.cs.toronto.edu/~kriz/cifar.html).

The folder of batch files is searched in ``<data>`` and in ``<data>/<Name>``; ``<data>`` may also be this folder itself.
If it is not found, the archive is unpacked: the one in ``<data>``, or else a downloaded one. The pickles are read by an
unpickler that builds only NumPy arrays and plain values, so a file from an unknown source cannot run code.
"""

import logging
import pickle
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from project.data.datamodule import ImageDataModule
from project.data.sets.download import download
from project.data.sets.idx import md5

log = logging.getLogger(__name__)


class CifarDataModule(ImageDataModule):
    """Base class of the data sets in CIFAR's format."""

    image_shape = (3, 32, 32)
    folder_name: str
    archive: tuple[str, str]
    """Name and MD5 of the archive."""
    train_files: dict[str, str]
    """Names of the training files, each with its MD5."""
    test_files: dict[str, str]
    """Names of the test files, each with its MD5."""
    label_key: str
    """Key of the labels in a file's dictionary."""

    def prepare_data(self) -> None:
        """Unpack the archive if the files are missing; download it if the archive is missing too.

        Raises:
            ValueError: if the download fails, or if the archive is damaged.
        """
        if self._find(train=True) is not None and self._find(train=False) is not None:
            return
        archive = self.data_dir / self.archive[0]
        if not archive.is_file():
            try:
                download([f"https://www.cs.toronto.edu/~kriz/{archive.name}"], archive, self.archive[1])
            except ConnectionError as error:
                log.info("Download failed: %s", error)
                raise ValueError(self._missing()) from None
        _unpack(archive, self.folder_name)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """The images ``[N, 3, 32, 32]`` uint8 and labels ``[N]`` int64 of one part of the data set.

        Args:
            train: whether to load the training images (with validation) or the test images.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        folder = self._find(train)
        if folder is None:
            raise ValueError(self._missing())
        files = self.train_files if train else self.test_files
        batches = [self._read(folder / name, checksum) for name, checksum in files.items()]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return images, labels

    def _find(self, train: bool) -> Path | None:
        folders = [
            self.data_dir / self.folder_name,
            self.data_dir / type(self).__name__ / self.folder_name,
            self.data_dir,
        ]
        names = self.train_files if train else self.test_files
        return next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)

    def _read(self, path: Path, checksum: str) -> tuple[Tensor, Tensor]:
        contents = path.read_bytes()
        entries = load_pickle(contents, path)
        pixels, labels = entries.get("data"), entries.get(self.label_key)
        if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or pixels.shape != (len(labels), 3072):
            raise ValueError(
                f"{path} holds no 'data' [N, 3072] with N labels under {self.label_key!r}: "
                f"delete {path.parent} and download it again."
            )
        targets = torch.tensor(labels, dtype=torch.int64)
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < self.num_classes:
            raise ValueError(
                f"{path} holds labels {int(targets.min())} to {int(targets.max())}, but {type(self).__name__} has "
                f"{self.num_classes} classes: delete {path.parent} and download it again."
            )
        if md5(contents) != checksum:
            log.warning("%s differs from the published %s (checksum); using it as it is.", path, type(self).__name__)
        return torch.from_numpy(pixels.astype(np.uint8)).view(-1, *self.image_shape), targets

    def _missing(self) -> str:
        return (
            f"{type(self).__name__}'s files are missing and could not be downloaded: put {self.archive[0]} "
            f"(or the folder {self.folder_name} from it) into {self.data_dir}, "
            "or name the folder that has it in data_dir or PROJECT_DATA_DIR."
        )


class CIFAR10(CifarDataModule):
    """CIFAR-10: colour images of 32x32 pixels in ten classes of animals and vehicles.

    Example::

        data:
          class_path: project.data.CIFAR10
          init_args:
            batch_size: 128
            augment:
              - class_path: project.data.PadCrop
                init_args: {padding: 4, mode: reflect}
              - class_path: project.data.HorizontalFlip
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    folder_name = "cifar-10-batches-py"
    archive = ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
    train_files = {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    }
    test_files = {"test_batch": "40351d587109b95175f43aff81a1287e"}
    label_key = "labels"


class CIFAR100(CifarDataModule):
    """CIFAR-100: colour images of 32x32 pixels in a hundred classes (the fine labels).

    Example::

        data:
          class_path: project.data.CIFAR100
          init_args: {batch_size: 128, val_fraction: 0.1}
        model:
          net:
            class_path: project.models.SmallInception
            init_args: {width: 2.0, fc_dropout: 0.3}
    """

    class_names = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
        "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair",
        "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin",
        "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp",
        "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
        "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck",
        "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
        "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
        "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television",
        "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf",
        "woman", "worm",
    )  # fmt: skip
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    folder_name = "cifar-100-python"
    archive = ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
    train_files = {"train": "16019d7e3df5f24257cddd939b257f8d"}
    test_files = {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
    label_key = "fine_labels"


def load_pickle(contents: bytes, path: Path) -> dict[str, Any]:
    """The dictionary in a batch file, with its keys as text. No code of the file is run.

    Raises:
        ValueError: if the file is truncated, is no pickle of a dictionary, or contains anything but arrays and plain
            values.
    """
    try:
        entries = _ArrayUnpickler(BytesIO(contents), encoding="latin1").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{path} is truncated or damaged ({error}): delete it and download it again.") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds no batch of images: delete it and download it again.")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in entries.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows the functions that make NumPy arrays, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda cls, shape, kind: np.ndarray(shape, kind)  # an empty array; its state follows
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return lambda kind, align=False, copy=False: np.dtype(kind, bool(align), bool(copy))
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpack(archive: Path, folder_name: str) -> None:
    """Unpack the archive into a temporary folder and then rename it, so that an interruption leaves no partial folder.

    Raises:
        ValueError: if the archive is damaged or lacks the folder.
    """
    log.info("Unpacking %s", archive)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpack-") as folder:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            (Path(folder) / folder_name).replace(archive.parent / folder_name)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{archive} is truncated or damaged ({error}): delete it and download it again.") from None
