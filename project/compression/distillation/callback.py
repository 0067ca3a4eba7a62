"""Knowledge distillation: train a net with the outputs of a teacher net beside the labels.

The teacher is the net of another run, or this run's own dense net while the run prunes it. Paper: Hinton et al. 2015
(arXiv:1503.02531). The formula is in :mod:`project.compression.distillation.loss`.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from project.callbacks.places import run_of
from project.compression.company import stages_of
from project.compression.distillation.loss import Distillation, check_distillation
from project.frame.paths import Run
from project.learning.checkpoints import load_net
from project.learning.classifier import Classifier
from project.models.net_check import channels_last_

log = logging.getLogger(__name__)


class DistillFrom(Callback):
    """Adds a teacher to the training loss.

    With ``teacher: null`` the callback must come after the pruning callback in the list, because the dense net is
    saved when the first round of pruning begins.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.DistillFrom
              init_args: {teacher: logs/fashion_mnist, temperature: 4, weight: 0.9}

    Args:
        teacher: folder of another run, whose best checkpoint is the teacher; the folder of an experiment means its
            newest run. None takes this run's own dense net (``level_0.ckpt``), from the first round of pruning on.
        temperature: number that the logits of both nets are divided by, above 0.
        weight: share of the teacher's term in the loss, in [0, 1].
        begin_epoch: first epoch with the teacher of another run, counted from 0; 0 or more. Set it to the number of
            epochs of the dense training if only the pruned net shall learn from the teacher.

    Raises:
        ValueError: if a number is outside its range, if the folder holds no run, or if the teacher was trained on
            images of another shape or on another number of classes.
    """

    def __init__(
        self, teacher: str | None = None, temperature: float = 4.0, weight: float = 0.9, begin_epoch: int = 0
    ) -> None:
        check_distillation(temperature, weight)
        if begin_epoch < 0:
            raise ValueError(f"begin_epoch is {begin_epoch}, but epochs are counted from 0: choose 0 or more.")
        if begin_epoch and teacher is None:
            raise ValueError(
                f"begin_epoch is {begin_epoch}, but the run's own dense net is the teacher from the first round of "
                "pruning on: set teacher to the folder of another run, or leave begin_epoch out."
            )
        self.teacher = teacher
        self.temperature = temperature
        self.weight = weight
        self.begin_epoch = begin_epoch
        self._net: nn.Module | None = None
        self._has_teacher = False

    @property
    def stages(self) -> tuple[str, ...]:
        """The name under which compression callbacks find this one; see :mod:`project.compression.company`."""
        return ("own teacher",) if self.teacher is None else ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Classifier):
            raise ValueError(
                f"the model is a {type(pl_module).__name__}, but DistillFrom needs a Classifier: "
                "use project.learning.Classifier or a subclass."
            )
        self._has_teacher = False
        if self.teacher is not None:
            self._net = _net_of(Run.find(self.teacher, "teacher").weights("teacher"), pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the teacher if the run continues within an epoch that has had it: that epoch does not start again."""
        if self._has_teacher:
            self._has_teacher = False
            self._find_teacher(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the teacher. The run's own dense net exists only after the first round of pruning has begun."""
        if trainer.current_epoch >= self.begin_epoch and (self.teacher is not None or _has_dense_net(trainer)):
            self._find_teacher(trainer, pl_module)

    def _find_teacher(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Classifier)
        run = getattr(trainer, "run", None)
        if module.distillation is not None:
            return
        if self._net is not None:
            self._teach(module, self._net)
        elif run is not None:
            path = run.level_checkpoint(0)
            trainer.strategy.barrier()
            if path.is_file():
                self._teach(module, load_net(module, path))
                if run_of(trainer) is not None:
                    log.info("the dense net is the teacher from epoch %d on", trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"has_teacher": self._has_teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._has_teacher = state_dict["has_teacher"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            pl_module.distillation = self._net = None
            self._has_teacher = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the teacher away, since Lightning calls no ``teardown`` after an error.

        A checkpoint that another callback saves after this hook still says that the epoch has a teacher.
        """
        if isinstance(pl_module, Classifier):
            pl_module.distillation = self._net = None

    def _teach(self, module: Classifier, net: nn.Module) -> None:
        if module.channels_last:
            channels_last_(net)
        assert isinstance(module.dtype, torch.dtype)
        self._has_teacher = True
        module.distillation = Distillation(net.to(module.device, module.dtype), self.temperature, self.weight)


def _has_dense_net(trainer: Trainer) -> bool:
    """Whether the pruning callback, if there is one, has kept the dense net.

    The file alone does not say so: it may come from a later epoch, in a run that was killed and is resumed.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return all(getattr(each, "levels", True) for each in callbacks if "pruning" in stages_of(each))


def _net_of(checkpoint: Path, student: Classifier) -> nn.Module:
    if not checkpoint.is_file():
        raise ValueError(
            f"teacher is {str(checkpoint.parent.parent)!r}, but that run has no checkpoints/best.ckpt: "
            "choose a run that has finished an epoch."
        )
    if "net" not in torch.load(checkpoint, map_location="meta", weights_only=True).get("hyper_parameters", {}):
        return load_net(student, checkpoint)  # built in Python, so its class is not stored: it must be the student's
    teacher = Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    if (teacher.image_shape, teacher.num_classes) != (student.image_shape, student.num_classes):
        raise ValueError(
            f"the teacher takes images of shape {teacher.image_shape} and has {teacher.num_classes} classes, but this "
            f"net takes {student.image_shape} and has {student.num_classes}: set teacher to a run on the same data."
        )
    return teacher.net
