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

    Raises:
        ValueError: if there is no image; and, while the images are loaded, if one cannot be decoded.
    """
    from project.data.array_dataset import pass_through
    from project.data.image_files import ImageFiles, find_images

    files = find_images(path)
    loader = DataLoader(ImageFiles(files, image_shape), batch_size=batch_size, collate_fn=pass_through)
    return loader, [str(file) for file in files]


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

    Args:
        path: path of the CSV file.
        names: names of the N images; ``None`` numbers them.
        probabilities: probability of each class for each image, ``[N, K]``.
        class_names: names of the K classes.
    """
    confidences, classes = probabilities.max(dim=1)
    names = names if names is not None else [str(index) for index in range(len(probabilities))]
    labels = [class_names[index] for index in classes.tolist()]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "class", "confidence", *class_names])
            for name, label, confidence, row in zip(
                names, labels, confidences.tolist(), probabilities.tolist(), strict=True
            ):
                writer.writerow([name, label, f"{confidence:.6f}", *(f"{value:.6f}" for value in row)])

    write_whole(path, write)
    log.info("%d predictions: %s", len(probabilities), path)
    for name, label, confidence in list(zip(names, labels, confidences.tolist(), strict=True))[:5]:
        log.info("  %s: %s (%.1f %%)", name, label, 100 * confidence)
