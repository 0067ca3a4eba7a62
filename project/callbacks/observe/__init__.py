"""What a run shows beside its curves, most of it in TensorBoard; ``trainer.observe: false`` leaves it out."""

from lightning.pytorch import Callback

from project.callbacks.observe.hparams import HParams
from project.callbacks.observe.log_graph import LogGraph
from project.callbacks.observe.look_at_batch import LookAtBatch
from project.callbacks.observe.report_of_test import TestReport
from project.callbacks.observe.slow_norms import WarnOfSlowNorms
from project.callbacks.observe.weight_histograms import WeightHistograms

CALLBACKS: list[type[Callback]] = [LookAtBatch, LogGraph, WeightHistograms, TestReport, HParams, WarnOfSlowNorms]
"""The callbacks of a run with ``trainer.observe: true``, in their order."""
