"""Where callbacks write: TensorBoard's writer, the run's folder, and files that are never half written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from project.paths import Run

if TYPE_CHECKING:
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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: a reader sees the old file or the new one, never a
    half.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix stays last: savefig goes by it
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
