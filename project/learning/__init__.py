"""The parts of learning that are not the net: the LightningModule, optimizers, schedules, checkpoints."""

from project.frame.rooms import lazily

_HOMES = {
    "Classifier": "project.learning.classifier",
    "Cosine": "project.learning.schedules",
    "Linear": "project.learning.schedules",
    "Muon": "project.learning.optimizers",
    "OneCycle": "project.learning.schedules",
    "Plateau": "project.learning.schedules",
    "Schedule": "project.learning.schedules",
    "Steps": "project.learning.schedules",
}
"""The module that each name is defined in. It is imported when the name is first used."""

__all__ = sorted(_HOMES)
__getattr__ = lazily(_HOMES)


def __dir__() -> list[str]:
    return __all__
