"""Which files of a folder are images, and which folders are the parts and the classes of a data set.

Hidden files, and files and folders that systems make, are passed over without a word. All else that is left out is
counted in a warning.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_HIDDEN = re.compile(r"(?i)\..*|__MACOSX|@eaDir|\$RECYCLE\.BIN|lost\+found|__pycache__|(eh)?thumbs\.db|desktop\.ini")
_IMAGE = re.compile(  # what Pillow reads, some of it with a plugin
    r"(?i)\.(a?png|avifs?|bmp|dds|dib|gif|hei[cf]|hif|ico|j2[ck]|jfif|jp[2cefgx]|jpeg|jxl|mpo|p[bfgnp]m|pcx|psd|qoi|ras"
    r"|sgi|tga|tiff?|webp)"
)
_PART = re.compile(r"(?i)(?<![a-z])(train|val|test)(ing|id|idation)?(?![a-z])")


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """The image file ``path``, or all image files in the folder ``path`` and in the folders below, sorted.

    Hidden files and folders are no images. Files whose names do not end as those of images do are counted in a warning.

    Args:
        path: path of an image file or of a folder.

    Raises:
        ValueError: if the path does not exist, or if the folder holds no image.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: name an image file or a folder of image files.")
    found, others = search(path)
    tell_left_out(path, others)
    if not found:
        raise ValueError(f"{path} holds no images: put files in it whose names end in .jpg, .png, .tif or the like.")
    return found


def search(path: Path) -> tuple[list[Path], list[Path]]:
    """The image files in a folder and below, and all other files that are not hidden; both sorted.

    Links to folders are followed, but no folder is read twice, and no folder above ``path``.
    """
    files = sorted(_files(path, set(path.resolve().parents)))
    return [file for file in files if is_image(file)], [file for file in files if not is_image(file)]


def is_image(path: Path) -> bool:
    """Whether a name ends as those of images do."""
    return _IMAGE.fullmatch(path.suffix) is not None


def tell_left_out(path: Path, left_out: list[Path]) -> None:
    """Warn of files and folders in ``path`` that are not used."""
    if left_out:
        kinds = Counter(child.suffix.lower() or child.name for child in left_out).most_common(5)
        kind = ", ".join(f"{count} {kind}" for kind, count in kinds)
        log.warning("%s: %d files or folders are left out, being no images of a class: %s", path, len(left_out), kind)


def beside(path: Path, used: set[Path]) -> list[Path]:
    """The images and folders in ``path`` that are not used."""
    return [child for child in _visible(path) if child not in used and (is_image(child) or child.is_dir())]


def folders(path: Path) -> list[Path]:
    """The folders in ``path`` that are not hidden, sorted."""
    return [child for child in _visible(path) if child.is_dir()]


def find_parts(root: Path) -> dict[str, Path]:
    """The folders of ``train``, ``val`` and ``test`` images. Without a division, ``root`` is ``train``.

    A folder of training images has class folders. A folder ``train`` without any is a class, beside other classes.

    Raises:
        ValueError: if two folders are the same part, or if folders look like parts but none is for training.
    """
    children = folders(root)
    like_parts = {child: match for child in children if (match := _PART.search(child.name))}
    named = [(match.group(1).lower(), child) for child, match in like_parts.items() if match.group() == child.name]
    parts = dict(named)
    is_divided = "train" in parts and bool(folders(parts["train"]))
    if is_divided and len(parts) == len(named):
        return parts
    divided = {child for child in like_parts if folders(child)}
    if is_divided or len(divided) > 1 or divided & set(parts.values()) or (named and len(named) == len(children)):
        names = ", ".join(child.name for child in like_parts)
        raise ValueError(f"{root} holds {names}: name its parts train, val and test, each with class folders in it.")
    return {"train": root}


def find_classes(train: Path) -> tuple[str, ...]:
    """The names of the class folders for training.

    Raises:
        ValueError: if there are fewer than two classes, or if a class is divided into parts.
    """
    classes = folders(train)
    if not classes:
        raise ValueError(f"{train} holds no class folders: put each class's images in a folder of its name.")
    if len(classes) == 1:
        raise ValueError(f"{train} holds one class, {classes[0].name}: name the folder above the classes.")
    if inner := [folder.name for folder in folders(classes[0]) if _PART.fullmatch(folder.name)]:
        raise ValueError(f"{classes[0]} holds {', '.join(inner)}: put the class folders in folders of these names.")
    return tuple(folder.name for folder in classes)


def _visible(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if not _HIDDEN.fullmatch(child.name))


def _files(path: Path, seen: set[Path]) -> Iterator[Path]:
    if (real := path.resolve()) in seen:
        return
    seen.add(real)
    for child in _visible(path):
        if child.is_dir():
            yield from _files(child, seen)
        elif child.is_file() or child.is_symlink():  # the reader names a link to nothing
            yield child
