"""What is measured: complexity, latency, environment; and the report that joins them.

Accuracy and calibration come from torchmetrics, in the classifier.
"""

from project.metrics.complexity import (
    LayerComplexity,
    complexity_by_layer,
    count_macs,
    count_nonzero,
    count_parameters,
    parameter_bytes,
)
from project.metrics.engines import available, engine, engines, onnx_engine, openvino_engine
from project.metrics.environment import cpu_model, describe_environment
from project.metrics.latency import Latency, best, measure
from project.metrics.report import ReportRow, describe, read_report, to_markdown, weight_sparsity, write_report

__all__ = [
    "Latency",
    "LayerComplexity",
    "ReportRow",
    "available",
    "best",
    "complexity_by_layer",
    "count_macs",
    "count_nonzero",
    "count_parameters",
    "cpu_model",
    "describe",
    "describe_environment",
    "engine",
    "engines",
    "measure",
    "onnx_engine",
    "openvino_engine",
    "parameter_bytes",
    "read_report",
    "to_markdown",
    "weight_sparsity",
    "write_report",
]
