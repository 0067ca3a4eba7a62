"""Hyperparameter search: the space, the storage, the trials and the report. Optuna does the search itself."""

from project.frame.rooms import lazily

_HOMES = {
    "Dimension": "project.tuning.dimension",
    "Plan": "project.tuning.plan",
    "Space": "project.tuning.space",
    "find_batch_size": "project.tuning.batch_size",
    "find_lr": "project.tuning.finders",
    "open_storage": "project.tuning.storage",
    "tune": "project.tuning.study",
}
"""The module that each name is defined in. It is imported when the name is first used."""

__all__ = sorted(_HOMES)
__getattr__ = lazily(_HOMES)


def __dir__() -> list[str]:
    return __all__
