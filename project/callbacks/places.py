"""Where callbacks write: TensorBoard, the run's folder; and files that are never half written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from project.paths import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


def tensorboard(trainer: Trainer) -> "SummaryWriter | None":
    """The writer of the first TensorBoard logger; ``None`` without one, and on every process but the first."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def run_of(trainer: Trainer) -> Run | None:
    """The run a trainer writes to; ``None`` where it has none (a plain Lightning trainer) and beyond the first
    process.
    """
    return getattr(trainer, "run", None) if trainer.is_global_zero else None


def show_figure(trainer: Trainer, tag: str, figure: "Figure") -> None:
    """Put a figure into TensorBoard as ``tag`` and into the run's folder as ``<last part of tag>.png``, drawn once."""
    from PIL import Image

    from project.plots import figure_to_image

    pixels = figure_to_image(figure)
    if (writer := tensorboard(trainer)) is not None:
        writer.add_image(tag, pixels, trainer.global_step, dataformats="HWC")
    if (run := run_of(trainer)) is not None:
        write_whole(run.folder / f"{tag.rpartition('/')[2]}.png", Image.fromarray(pixels).save)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: a reader sees the old file or the new one, never a
    half.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix stays last: image writers go by it
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
