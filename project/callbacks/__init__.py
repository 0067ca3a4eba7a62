"""The names of all callbacks. Those of every run are defined in this folder, the others in their technique's folder."""

from project.frame.rooms import lazily

_PROBES = "Activation", "Curvature", "GradientNorm", "Landscape", "Sharpness"
_HOMES = {
    "BestAndLast": "project.callbacks.checkpoint",
    "ContinueFromCheckpoint": "project.callbacks.continuing",
    "DistillFrom": "project.compression.distillation.callback",
    "EMA": "project.callbacks.ema",
    "HParams": "project.callbacks.observe.hparams",
    "IterativeMagnitudePruning": "project.compression.pruning.callback",
    "LogGraph": "project.callbacks.observe.log_graph",
    "LookAtBatch": "project.callbacks.observe.look_at_batch",
    "LowRank": "project.compression.low_rank.callback",
    "Packing": "project.deployment.packed.callback",
    "PostTrainingQuantization": "project.deployment.int8.callback",
    "ProgressLines": "project.callbacks.progress",
    "QuantizationAwareTraining": "project.compression.qat.callback",
    "StartLines": "project.callbacks.start_lines",
    "StopOnNaN": "project.callbacks.nan_guard",
    "TellHowToResume": "project.callbacks.stopping",
    "TernaryWeights": "project.compression.low_bit.ternary_callback",
    "TestReport": "project.callbacks.observe.report_of_test",
    "WarnOfSlowNorms": "project.callbacks.observe.slow_norms",
    "WeightHistograms": "project.callbacks.observe.weight_histograms",
    "WeightSharing": "project.compression.weight_sharing.callback",
    "WinogradConvolutions": "project.compression.winograd.callback",
    "WriteSummary": "project.callbacks.summary",
    "XNORNet": "project.compression.low_bit.xnor_callback",
    "default_callbacks": "project.callbacks.defaults",
    "default_progress_bar": "project.callbacks.progress",
    **{f"{name}Probe": "project.metrics.probes.callbacks" for name in _PROBES},
}
"""The module that each name is defined in. It is imported when the name is first used."""

__all__ = sorted(_HOMES)
__getattr__ = lazily(_HOMES)
__dir__ = __all__.copy
