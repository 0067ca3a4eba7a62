"""Classify image files, and write the predictions to a CSV file."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, distributed
from torch.utils.data import DataLoader

from project.frame.paths import write_whole

log = logging.getLogger(__name__)


def image_loader(
    path: str | os.PathLike[str], image_shape: tuple[int, int, int], batch_size: int = 256
) -> tuple[DataLoader[Any], list[str]]:
    """A loader of the images at ``path``, and their file names. A batch begins with uint8 images ``[N, C, H, W]``.

    A file that cannot be decoded is a black image, for :func:`mark_unreadable_`.

    Raises:
        ValueError: if there is no image; and, while the images are loaded, if the only one cannot be decoded.
    """
    from project.data.array_dataset import pass_through
    from project.data.image_files import ImageFiles
    from project.data.image_paths import find_images

    files = find_images(path)
    images = ImageFiles(files, image_shape, on_corrupt="mark" if len(files) > 1 else "error")
    loader = DataLoader(images, batch_size=batch_size, collate_fn=pass_through)
    return loader, [str(file) for file in files]


def mark_unreadable_(probabilities: Tensor, loader: Any, rank: int = 0, size: int = 1) -> Tensor:
    """Give the files that ``loader`` could not decode the probability -1. Of R processes, each has its own rows.

    Raises:
        ValueError: if no file could be decoded.
    """
    unreadable = loader.dataset.unreadable
    if len(unreadable) == len(loader.dataset):
        raise ValueError(f"none of {len(unreadable)} files can be read; the first: {next(iter(unreadable.values()))}")
    probabilities[[(index - rank) // size for index in unreadable]] = -1.0
    return probabilities


def of_all_processes(part: Tensor) -> Tensor:
    """The rows of all processes in their order. Of R processes, process r has the rows r, r + R, r + 2R, …"""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return part
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, part.cpu())
    whole = part.new_empty(sum(map(len, parts)), *part.shape[1:], device="cpu")
    for rank, rows in enumerate(parts):
        whole[rank :: len(parts)] = rows
    return whole


def write_predictions(
    path: Path, names: Sequence[str] | None, probabilities: Tensor, class_names: Sequence[str]
) -> None:
    """Write a CSV file with the columns ``file, class, confidence`` and one probability for each class.

    The row of a file that could not be decoded has the class ``unreadable`` and no numbers.

    Args:
        path: path of the CSV file.
        names: names of the N images; ``None`` numbers them.
        probabilities: probability of each class for each image, ``[N, K]``; -1 for files that could not be decoded.
        class_names: names of the K classes.
    """
    rows = []
    for index, row in enumerate(probabilities.tolist()):
        best = max(row)
        label = "unreadable" if best == -1 else class_names[row.index(best)]
        values = ("" if value == -1 else f"{value:.6f}" for value in (best, *row))
        rows.append([index if names is None else names[index], label, *values])

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file", "class", "confidence", *class_names], *rows])

    write_whole(path, write)
    log.info("%d predictions: %s", len(probabilities), path)
    for name, label, confidence, *_ in rows[:5]:
        log.info("  %s: %s (%.1f %%)", name, label, 100 * float(confidence or 0))
