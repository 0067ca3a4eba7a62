"""The places that callbacks write to: TensorBoard and the run's folder."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from project.frame.paths import Run, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


def tensorboard(trainer: Trainer) -> "SummaryWriter | None":
    """The writer of the first TensorBoard logger; ``None`` without such a logger and in all processes but the first."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def run_of(trainer: Trainer) -> Run | None:
    """The run that a trainer writes to.

    ``None`` if it has no run, as a plain Lightning trainer, or if this is not the first process.
    """
    return getattr(trainer, "run", None) if trainer.is_global_zero else None


def show_figure(trainer: Trainer, tag: str, figure: "Figure") -> None:
    """Draw a figure once, and write it to TensorBoard and to the run's folder.

    In TensorBoard its name is ``tag``, in the folder ``<last part of tag>.png``.
    """
    from PIL import Image

    from project.frame.plots import figure_to_image

    pixels = figure_to_image(figure)
    if (writer := tensorboard(trainer)) is not None:
        writer.add_image(tag, pixels, trainer.global_step, dataformats="HWC")
    if (run := run_of(trainer)) is not None:
        write_whole(run.folder / f"{tag.rpartition('/')[2]}.png", Image.fromarray(pixels).save)
