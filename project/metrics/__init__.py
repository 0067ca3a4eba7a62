"""What is measured: complexity, environment. Accuracy and calibration come from torchmetrics, in the classifier."""

from project.metrics.complexity import (
    LayerComplexity,
    complexity_by_layer,
    count_macs,
    count_nonzero,
    count_parameters,
    parameter_bytes,
)
from project.metrics.environment import cpu_model, describe_environment

__all__ = [
    "LayerComplexity",
    "complexity_by_layer",
    "count_macs",
    "count_nonzero",
    "count_parameters",
    "cpu_model",
    "describe_environment",
    "parameter_bytes",
]
