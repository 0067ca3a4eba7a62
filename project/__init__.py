"""Train, shrink, measure and deploy image classifiers with PyTorch Lightning."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_FORMER_PACKAGES: tuple[str, ...] = ()
"""Former names of this package. ``scripts/rename.py`` adds one, so that older runs are found under the new name."""
_FORMER = {
    "project.callbacks.distillation": "project.compression.distillation.callback",
    "project.callbacks.hparams": "project.callbacks.observe.hparams",
    "project.callbacks.log_graph": "project.callbacks.observe.log_graph",
    "project.callbacks.look_at_batch": "project.callbacks.observe.look_at_batch",
    "project.callbacks.test_report": "project.callbacks.observe.report_of_test",
    "project.callbacks.progress_bars": "project.callbacks.observe.progress_bars",
    "project.callbacks.weight_histograms": "project.callbacks.observe.weight_histograms",
    "project.cli": "project.frame.cli",
    "project.data.cifar": "project.data.sets.cifar",
    "project.data.mnist": "project.data.sets.mnist",
    "project.losses.distillation": "project.compression.distillation.loss",
    "project.models.googlenet": "project.models.zoo.googlenet",
    "project.models.inception_v3": "project.models.zoo.inception_v3",
    "project.models.inception_v3_blocks": "project.models.zoo.inception_v3_blocks",
    "project.models.lenet": "project.models.zoo.lenet",
    "project.optimizers": "project.learning.optimizers",
    "project.paths": "project.frame.paths",
    "project.schedules": "project.learning.schedules",
    "project.trainer": "project.frame.verbs",
}
"""Former names of modules. Configurations of older runs, and code of forks, may still use them."""


class _FormerNames(MetaPathFinder, Loader):
    """Imports a module under its former name as the same module object."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if _today(name) != name else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(_today(module.__name__))


def _today(name: str) -> str:
    """The present name of a module."""
    package, dot, rest = name.partition(".")
    name = __name__ + dot + rest if package in _FORMER_PACKAGES else name
    return _FORMER.get(name, name)


sys.meta_path.insert(0, _FormerNames())
