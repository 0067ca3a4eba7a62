"""Probes of the loss landscape: measurements that leave a net as they find it.

The functions know no Lightning. The classes are callbacks, which measure in any run.
"""

from project.frame.rooms import lazily
from project.metrics.probes.activations import activation_sparsity
from project.metrics.probes.gradient_norms import gradient_norms
from project.metrics.probes.hessian import top_eigenvalue, top_eigenvalues
from project.metrics.probes.interpolation import interpolate, loss_and_accuracy, state_between
from project.metrics.probes.landscape import Landscape, loss_landscape
from project.metrics.probes.sharpness import sharpness
from project.metrics.probes.unchanged import unchanged

_HOMES = {
    "ActivationProbe": "project.metrics.probes.callbacks",
    "CurvatureProbe": "project.metrics.probes.callbacks",
    "GradientNormProbe": "project.metrics.probes.callbacks",
    "LandscapeProbe": "project.metrics.probes.callbacks",
    "SharpnessProbe": "project.metrics.probes.callbacks",
}
"""The module of each callback, which is imported when its name is first used."""

__all__ = [
    "Landscape",
    "activation_sparsity",
    "gradient_norms",
    "interpolate",
    "loss_and_accuracy",
    "loss_landscape",
    "sharpness",
    "state_between",
    "top_eigenvalue",
    "top_eigenvalues",
    "unchanged",
    *_HOMES,
]
__getattr__ = lazily(_HOMES)


def __dir__() -> list[str]:
    return __all__
