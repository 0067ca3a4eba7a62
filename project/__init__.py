"""Train, shrink, measure and deploy image classifiers with PyTorch Lightning."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_FORMER = {
    "project.cli": "project.frame.cli",
    "project.optimizers": "project.learning.optimizers",
    "project.paths": "project.frame.paths",
    "project.schedules": "project.learning.schedules",
    "project.trainer": "project.frame.verbs",
}
"""Former names of modules. Configurations of older runs, and code of forks, may still use them."""


class _FormerNames(MetaPathFinder, Loader):
    """Imports a module under its former name as the same module object."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(_FORMER[module.__name__])


sys.meta_path.insert(0, _FormerNames())
