"""The callbacks that every run has. A configured callback of the same class takes the place of a default."""

from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback, ProgressBar

from project.callbacks.checkpoint import BestAndLast
from project.callbacks.continuing import ContinueFromCheckpoint
from project.callbacks.nan_guard import StopOnNaN
from project.callbacks.progress import default_progress_bar
from project.callbacks.start_lines import StartLines
from project.callbacks.stopping import TellHowToResume
from project.callbacks.summary import WriteSummary
from project.frame.rooms import optional


def default_callbacks(
    own: Sequence[Callback] = (), *, observe: bool = True, checkpoint: bool = True, progress: bool = True
) -> list[Callback]:
    """The configured callbacks, and each default whose class is not among them.

    Args:
        own: configured callbacks. They come after the progress display and before the other defaults, and
            :class:`~project.callbacks.BestAndLast` always comes last.
        observe: whether to add the callbacks that draw in TensorBoard.
        checkpoint: whether to add :class:`~project.callbacks.BestAndLast`, which saves checkpoints.
        progress: whether to add a progress bar (on a terminal) or progress lines (elsewhere).
    """
    kinds: list[type[Callback]] = [ContinueFromCheckpoint, StartLines, StopOnNaN, WriteSummary]
    if observe and (room := optional("callbacks.observe")) is not None:
        kinds += room.CALLBACKS
    callbacks = [*own, *(kind() for kind in kinds if not _has(own, kind))]
    if progress and not _has(own, ProgressBar):
        # First, so that an epoch's line is printed before other callbacks report on the next epoch.
        callbacks.insert(0, default_progress_bar())
    if not _has(own, TellHowToResume):
        callbacks.insert(0, TellHowToResume())
    if checkpoint and not _has(own, BestAndLast):
        callbacks.append(BestAndLast())
    # BestAndLast comes last, since it may follow another checkpoint callback.
    return sorted(callbacks, key=lambda callback: isinstance(callback, BestAndLast))


def _has(callbacks: Sequence[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
