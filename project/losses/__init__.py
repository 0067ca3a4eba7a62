"""Classification losses and penalties on weights."""

from project.frame.rooms import lazily
from project.losses.cross_entropy import CrossEntropy
from project.losses.penalties import MaxNorm, Penalties

__all__ = ["CrossEntropy", "Distillation", "MaxNorm", "Penalties"]
__getattr__ = lazily({"Distillation": "project.compression.distillation.loss"})
