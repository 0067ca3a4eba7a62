"""The frame of every run: command line, Trainer with its verbs, paths and the folder of a run."""

from project.frame.rooms import lazily

_HOMES = {
    "CLI": "project.frame.cli",
    "Paths": "project.frame.paths",
    "Run": "project.frame.paths",
    "RunTrainer": "project.frame.trainer",
    "Trainer": "project.frame.verbs",
}
"""The module that each name is defined in. It is imported when the name is first used."""

__all__ = sorted(_HOMES)
__getattr__ = lazily(_HOMES)


def __dir__() -> list[str]:
    return __all__
