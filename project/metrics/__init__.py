"""Counts of a net's parameters and operations. Accuracy and calibration come from torchmetrics, in the classifier."""

from project.metrics.complexity import (
    LayerComplexity,
    complexity_by_layer,
    count_macs,
    count_nonzero,
    count_parameters,
    parameter_bytes,
)

__all__ = [
    "LayerComplexity",
    "complexity_by_layer",
    "count_macs",
    "count_nonzero",
    "count_parameters",
    "parameter_bytes",
]
