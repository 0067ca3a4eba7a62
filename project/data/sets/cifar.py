"""CIFAR-10 and CIFAR-100: 50000 + 10000 colour images of 32x32 pixels in 10 or 100 classes, as Python pickles.

Learning multiple layers of features from tiny images, Krizhevsky 2009 (https://www.cs.toronto.edu/~kriz/cifar.html).

The folder of batch files is searched in ``<data>`` and in ``<data>/<Name>``; ``<data>`` may also be this folder itself.
If it is not found, the archive is unpacked: the one in ``<data>``, or else a downloaded one. The pickles are read by an
unpickler that builds only NumPy arrays and plain values, so a file from an unknown source cannot run code.
"""

import gzip
import logging
import math
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
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

Array = np.ndarray[Any, np.dtype[Any]]


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
        if not all(type(label) is int and abs(label) < 1 << 31 for label in labels):
            raise ValueError(f"{path} holds labels that are no integers: delete {path.parent} and download it again.")
        if labels and not 0 <= min(labels) <= max(labels) < self.num_classes:
            raise ValueError(
                f"{path} holds labels {min(labels)} to {max(labels)}, but {type(self).__name__} has "
                f"{self.num_classes} classes: delete {path.parent} and download it again."
            )
        targets = torch.tensor(labels, dtype=torch.int64)
        if md5(contents) != checksum:
            log.warning("%s differs from the published %s (checksum); using it as it is.", path, type(self).__name__)
        return torch.from_numpy(pixels.copy()).view(-1, *self.image_shape), targets

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
        ValueError: if the file is truncated, is no pickle of a dictionary, or contains anything but arrays of bytes and
            plain values.
    """
    try:
        entries = _ArrayUnpickler(contents).load()
    except Exception as error:  # damaged pickles raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is truncated or damaged ({reason}): delete it and download it again.") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds no batch of images: delete it and download it again.")
    texts = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in entries.items()}
    return {key: value.values if isinstance(value, _Array) else value for key, value in texts.items()}


class _Type:
    """What a pickle says of the type of an array's values. Only unsigned bytes are known."""

    def __init__(self, kind: object = None, align: object = False, copy: object = False) -> None:
        if kind not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError(f"it holds an array of {kind!r}, not of unsigned bytes (u1)")

    def __setstate__(self, state: object) -> None:
        """Its byte order does not matter."""


class _Array:
    """An array of a pickle. NumPy gets its values only after all of them are checked."""

    def __init__(self, unpickler: "_ArrayUnpickler") -> None:
        self._unpickler = unpickler
        self.values: Array | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        content = self._unpickler.to_bytes(content) if isinstance(content, str) else content
        known = isinstance(kind, _Type) and isinstance(content, bytes) and isinstance(shape, tuple) and len(shape) <= 4
        if not known or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError("it holds an array without a shape or values")
        if math.prod(shape) != len(content):
            raise pickle.UnpicklingError(f"it holds an array {list(shape)} of {len(content)} bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _refuse(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it has a code that makes neither arrays nor plain values")


def _recall(unpickler: Any, load: Callable[[Any], None]) -> None:
    """Take a value that was there before, but no tuple: the hash of tuples within tuples takes exponential time."""
    load(unpickler)
    if isinstance(unpickler.stack[-1], tuple):
        raise pickle.UnpicklingError("it holds a tuple twice")


_CODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING "
    "SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 LIST EMPTY_LIST APPEND "
    "APPENDS TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 DICT EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE "
    "BUILD PUT BINPUT LONG_BINPUT MEMOIZE"
)
"""The codes of pickle that make arrays and plain values."""
_OF_PICKLE: dict[int, Callable[..., None]] = pickle._Unpickler.dispatch


class _ArrayUnpickler(pickle._Unpickler):
    """An unpickler that knows the functions that make NumPy arrays, and no others. None of them runs NumPy's code.

    It is Python's unpickler in Python. The one in C reserves as much memory as a damaged file asks for.
    """

    stack: list[Any]
    dispatch = {
        **dict.fromkeys(range(256), _refuse),
        **{code: _OF_PICKLE[code] for code in (getattr(pickle, name)[0] for name in _CODES.split())},
        **{code: partial(_recall, load=_OF_PICKLE[code]) for code in (pickle.GET[0], pickle.BINGET[0])},
        pickle.LONG_BINGET[0]: partial(_recall, load=_OF_PICKLE[pickle.LONG_BINGET[0]]),
    }

    def __init__(self, contents: bytes) -> None:
        super().__init__(BytesIO(contents), encoding="latin1")
        self._left = len(contents)

    def to_bytes(self, text: str) -> bytes:
        """The bytes of a text. All of them together are at most as many as the file's, or else it holds one twice."""
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("it makes more bytes than it holds")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda cls, shape, kind: _Array(self)  # its state follows
        if (module, name) == ("numpy", "ndarray"):
            return None
        if (module, name) == ("numpy", "dtype"):
            return lambda kind, align=False, copy=False: _Type(kind)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: self.to_bytes(text)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_MAX_UNPACKED = 1 << 30
"""Largest number of bytes of an unpacked archive. CIFAR-10 and CIFAR-100 have less than a fifth of them."""


class _Limited:
    """A stream that ends with an error where it is longer than an archive of images may be."""

    def __init__(self, archive: Path) -> None:
        self._stream, self._left = gzip.GzipFile(fileobj=BytesIO(archive.read_bytes())), _MAX_UNPACKED

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.ReadError(f"it holds more than {_MAX_UNPACKED} bytes")
        content = self._stream.read(size)
        self._left -= len(content)
        return content


def _unpack(archive: Path, folder_name: str) -> None:
    """Unpack the archive into a temporary folder and then rename it, so that an interruption leaves no partial folder.

    Raises:
        ValueError: if the archive is damaged, lacks the folder, or holds more than images.
    """
    log.info("Unpacking %s", archive)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpack-") as folder:
        try:
            limited: Any = _Limited(archive)
            with tarfile.open(fileobj=limited, mode="r|") as tar:
                for member in tar:
                    if not member.isdir() and (not member.isfile() or member.size > _MAX_UNPACKED):
                        raise tarfile.ReadError(f"{member.name!r} is no file of images")
                    tar.extract(member, folder, filter="data")
                while limited.read(1 << 16):
                    pass  # gzip's checksum is at the end
            (Path(folder) / folder_name).replace(archive.parent / folder_name)
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{archive} is truncated or damaged ({reason}): delete it and download it again."
            ) from None
