"""What every run has, unless the configuration puts another of the same class in its place."""

from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback, ProgressBar

from project.callbacks.checkpoint import BestAndLast
from project.callbacks.hparams import HParams
from project.callbacks.log_graph import LogGraph
from project.callbacks.look_at_batch import LookAtBatch
from project.callbacks.nan_guard import StopOnNaN
from project.callbacks.progress_bars import default_progress_bar
from project.callbacks.start_lines import StartLines
from project.callbacks.stopping import TellHowToResume
from project.callbacks.summary import WriteSummary
from project.callbacks.test_report import TestReport
from project.callbacks.weight_histograms import WeightHistograms


def default_callbacks(
    own: Sequence[Callback] = (), *, observe: bool = True, checkpoint: bool = True, progress: bool = True
) -> list[Callback]:
    """The configured callbacks and the defaults whose kind is not among them.

    Args:
        own: configured callbacks; they come first.
        observe: add those that draw in TensorBoard.
        checkpoint: add the best and the last checkpoint.
        progress: add a progress bar or lines.
    """
    kinds: list[type[Callback]] = [StartLines, StopOnNaN, WriteSummary]
    if observe:
        kinds += [LookAtBatch, LogGraph, WeightHistograms, TestReport, HParams]
    callbacks = [*own, *(kind() for kind in kinds if not _has(own, kind))]
    if progress and not _has(own, ProgressBar):
        callbacks.insert(0, default_progress_bar())  # an epoch's line comes before what the others say of the next
    callbacks.insert(0, TellHowToResume())
    if checkpoint and not _has(own, BestAndLast):
        callbacks.append(BestAndLast())
    return sorted(callbacks, key=lambda callback: isinstance(callback, BestAndLast))  # after one that it follows


def _has(callbacks: Sequence[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
