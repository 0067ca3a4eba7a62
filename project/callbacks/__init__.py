"""When something happens. Each callback is thin; formulas live in ``losses``, ``metrics`` and ``compression``."""

from project.callbacks.checkpoint import BestAndLast
from project.callbacks.defaults import default_callbacks
from project.callbacks.distillation import DistillFrom
from project.callbacks.ema import EMA
from project.callbacks.hparams import HParams
from project.callbacks.log_graph import LogGraph
from project.callbacks.look_at_batch import LookAtBatch
from project.callbacks.low_rank import LowRank
from project.callbacks.nan_guard import StopOnNaN
from project.callbacks.packing import Packing
from project.callbacks.progress import ProgressLines, default_progress_bar
from project.callbacks.pruning import IterativeMagnitudePruning
from project.callbacks.quantization import PostTrainingQuantization, QuantizationAwareTraining
from project.callbacks.start_lines import StartLines
from project.callbacks.stopping import TellHowToResume
from project.callbacks.summary import WriteSummary
from project.callbacks.ternary import TernaryWeights
from project.callbacks.test_report import TestReport
from project.callbacks.weight_histograms import WeightHistograms
from project.callbacks.weight_sharing import WeightSharing
from project.callbacks.winograd import WinogradConvolutions
from project.callbacks.xnor import XNORNet

__all__ = [
    "EMA",
    "BestAndLast",
    "DistillFrom",
    "HParams",
    "IterativeMagnitudePruning",
    "LogGraph",
    "LookAtBatch",
    "LowRank",
    "Packing",
    "PostTrainingQuantization",
    "ProgressLines",
    "QuantizationAwareTraining",
    "StartLines",
    "StopOnNaN",
    "TellHowToResume",
    "TernaryWeights",
    "TestReport",
    "WeightHistograms",
    "WeightSharing",
    "WinogradConvolutions",
    "WriteSummary",
    "XNORNet",
    "default_callbacks",
    "default_progress_bar",
]
