"""Classification losses and penalties on weights."""

from project.losses.cross_entropy import CrossEntropy
from project.losses.distillation import Distillation
from project.losses.penalties import MaxNorm, Penalties

__all__ = ["CrossEntropy", "Distillation", "MaxNorm", "Penalties"]
