"""From a checkpoint to a model file: export, check, time and benchmark nets. The public names stand here."""

from project.frame.rooms import lazily

_HOMES = {
    "BenchmarkRow": "project.deployment.benchmark.rows",
    "Exported": "project.deployment.export",
    "FastestFile": "project.deployment.fastest_file",
    "Latency": "project.deployment.latency",
    "Metadata": "project.deployment.metadata",
    "ModelFile": "project.deployment.model_file",
    "Recipe": "project.deployment.recipe",
    "UntrustedError": "project.frame.trust",
    "best": "project.deployment.latency",
    "engine": "project.deployment.engines",
    "export_checkpoint": "project.deployment.export",
    "export_onnx": "project.deployment.onnx_file",
    "measure": "project.deployment.latency",
    "predict": "project.deployment.model_file",
    "unpack": "project.deployment.model_file",
}
"""The module that each name is defined in. It is imported when the name is first used.

A function that has the name of its module, such as ``export``, is imported from there: ``from
project.deployment.export import export``.
"""

__all__ = sorted(_HOMES)
__getattr__ = lazily(_HOMES)


def __dir__() -> list[str]:
    return __all__
