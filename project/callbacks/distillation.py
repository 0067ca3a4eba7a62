"""Train with a teacher: the net of another run, or this run's own dense net while it is made small.

Hinton et al. 2015 (arXiv:1503.02531); the formula is in :mod:`project.losses.distillation`.
"""

import logging
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from project.callbacks.places import run_of
from project.frame.paths import Run
from project.learning.checkpoints import load_net
from project.learning.classifier import Classifier
from project.losses.distillation import Distillation, check_distillation

log = logging.getLogger(__name__)


class DistillFrom(Callback):
    """Adds a teacher to the loss of training.

    Args:
        teacher: a run's folder, whose best checkpoint teaches; null is the run's own dense net, from the first round of
            pruning on (``level_0.ckpt``).
        temperature: of both nets' logits, above 0.
        weight: the teacher's share of the loss, in [0, 1].
        begin_epoch: the first epoch, from 0, with the teacher of another run; the length of the dense training has it
            teach what is pruned, and leaves the dense net as it is without.

    Raises:
        ValueError: for numbers outside their range, a folder without a run, a teacher of other images or classes.
    """

    def __init__(
        self, teacher: str | None = None, temperature: float = 4.0, weight: float = 0.9, begin_epoch: int = 0
    ) -> None:
        check_distillation(temperature, weight)
        if begin_epoch < 0:
            raise ValueError(f"begin_epoch is {begin_epoch}, but epochs count from 0: choose 0 or more.")
        if begin_epoch and teacher is None:
            raise ValueError(
                f"begin_epoch is {begin_epoch}, but the run's own dense net teaches from the first round of pruning "
                "on: name a run as the teacher, or leave begin_epoch out."
            )
        self.teacher = teacher
        self.temperature = temperature
        self.weight = weight
        self.begin_epoch = begin_epoch
        self._net: nn.Module | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """How compression callbacks know it; see :mod:`project.compression.company`."""
        return ("own teacher",) if self.teacher is None else ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Classifier):
            raise ValueError(
                f"the model is a {type(pl_module).__name__}, but what learns from a teacher is a Classifier."
            )
        if self.teacher is not None:
            self._net = _net_of(Run.find(self.teacher, "teacher").weights("teacher"), pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The own dense net is there once a round has begun; give this callback after the pruning."""
        assert isinstance(pl_module, Classifier)
        run = getattr(trainer, "run", None)
        if pl_module.distillation is not None:
            return
        if self._net is not None:
            if trainer.current_epoch >= self.begin_epoch:
                self._teach(pl_module, self._net)
        elif run is not None:
            path = run.level_checkpoint(0)
            trainer.strategy.barrier()
            if path.is_file():
                self._teach(pl_module, load_net(pl_module, path))
                if run_of(trainer) is not None:
                    log.info("the dense net teaches from epoch %d on", trainer.current_epoch + 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            pl_module.distillation = self._net = None

    def _teach(self, module: Classifier, net: nn.Module) -> None:
        if module.channels_last:
            net.to(memory_format=torch.channels_last)
        assert isinstance(module.dtype, torch.dtype)
        module.distillation = Distillation(net.to(module.device, module.dtype), self.temperature, self.weight)


def _net_of(checkpoint: Path, student: Classifier) -> nn.Module:
    if not checkpoint.is_file():
        raise ValueError(f"teacher is {str(checkpoint.parent.parent)!r}, but that run has no best checkpoint.")
    if "net" not in torch.load(checkpoint, map_location="meta", weights_only=True).get("hyper_parameters", {}):
        return load_net(student, checkpoint)  # built in Python: it can only be of the same kind
    teacher = Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    if (teacher.image_shape, teacher.num_classes) != (student.image_shape, student.num_classes):
        raise ValueError(
            f"the teacher takes images {teacher.image_shape} of {teacher.num_classes} classes, the net "
            f"{student.image_shape} of {student.num_classes}: choose a run on the same data."
        )
    return teacher.net
