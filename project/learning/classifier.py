"""The LightningModule: a net with its loss, penalties, metrics, optimizer and schedule. The formulas are elsewhere.

Linear scaling rule: Goyal et al. 2017 (arXiv:1706.02677, sec. 2.1). No weight decay on norms and biases: sec. 5.3 of
the same paper.
"""

import logging
import math
import os
import warnings
from collections.abc import Mapping, MutableMapping
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import OptimizerCallable, instantiate_module
from lightning.pytorch.core import saving
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassStatScores

from project.learning.checkpoints import check_checkpoint, mismatch, one_object_each, refused_if_damaged
from project.learning.schedules import Schedule
from project.learning.whole_batch import gather
from project.losses import CrossEntropy, MaxNorm, Penalties
from project.models.net_check import build_lazy_, channels_last_, check_loss, check_net, check_on_net
from project.models.surgery import Surgery, replay_, to_plain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A part of a run with an optimizer and a schedule of its own, such as one round of pruning.

    Args:
        epochs: number of epochs that the schedule is stretched over, at least 1.
        first_epoch: number of epochs of the schedule that are left out at its start, 0 or more; fractions are allowed.
        lr_factor: factor on the learning rate, above 0.
    """

    epochs: int
    first_epoch: float = 0
    lr_factor: float = 1.0


class Classifier(LightningModule):
    """A net that learns to classify images: ``[N, C, H, W] -> logits [N, num_classes]``.

    The command line takes ``num_classes``, ``image_shape``, ``class_names``, ``mean`` and ``std`` from the data module.

    Example::

        model:
          base_batch_size: 128
          optimizer:
            class_path: torch.optim.SGD
            init_args: {lr: 0.1, momentum: 0.9, nesterov: true, weight_decay: 5.e-4}
          schedule:
            class_path: project.learning.Cosine
            init_args: {warmup_epochs: 2}

    Args:
        net: plain module that maps normalised images to logits.
        num_classes: number K of classes, at least 1.
        image_shape: shape (C, H, W) of the images that the net takes.
        class_names: K names of the classes, in the order of the logits. ``None`` takes the numbers 0 to K - 1.
        mean, std: mean and standard deviation of each channel, for pixels in [0, 1], with which ``predict`` normalises.
        loss: module that maps logits ``[N, K]`` and targets to a scalar, for training. Targets are class numbers
            ``[N]``, or ``[N, K]`` with MixUp or CutMix. ``None`` takes :class:`project.losses.CrossEntropy`.
        penalties: module that maps the net to a scalar, which is added to the loss, or to ``None``. An example is
            :class:`project.losses.Penalties`. ``None`` means no penalty.
        max_norm: module that is called with the net after each optimizer step, such as :class:`project.losses.MaxNorm`.
            ``None`` means no bound.
        optimizer: callable that makes the optimizer of the parameters. Its ``weight_decay`` acts on weights only, never
            on norms or biases.
        schedule: schedule of the learning rate, an object of :mod:`project.learning.schedules`. ``None`` keeps the rate
            constant.
        base_batch_size: batch size that the optimizer's ``lr`` is meant for, at least 1. The rate is multiplied by
            (global batch size / ``base_batch_size``). ``None`` takes ``lr`` as it is.
        channels_last: whether weights and activations are channels-last in memory, which is two to three times faster
            on CPUs.
        compile: whether to run the net through ``torch.compile`` in ``fit``. Checkpoints stay those of the plain net.

    Raises:
        ValueError: if the base batch size is below 1, or if a lazy layer of the net cannot take the images.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        class_names: tuple[str, ...] | None = None,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        loss: nn.Module | None = None,
        penalties: nn.Module | None = None,
        max_norm: nn.Module | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        schedule: Schedule | None = None,
        base_batch_size: int | None = None,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if base_batch_size is not None and base_batch_size < 1:
            raise ValueError(f"base_batch_size is {base_batch_size}: choose 1 or more, or null to take lr as it is.")
        channels, height, width = image_shape  # YAML gives a list
        self.image_shape = (channels, height, width)
        # This comes first because `save_hyperparameters` copies its values, and a lazy layer cannot be copied.
        build_lazy_(net, self.image_shape)
        with warnings.catch_warnings():  # Lightning advises to leave the net out, but then checkpoints could not load
            warnings.filterwarnings("ignore", "Attribute '.*' is an instance of `nn.Module`")
            self.save_hyperparameters(logger=False)
        _keep_plain_(self.hparams)
        if "_instantiator" in self.hparams:  # the command line builds this classifier
            self.hparams["_instantiator"] = _INSTANTIATOR
        self.net, self.num_classes = net, num_classes
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"num_classes is {num_classes}, but class_names are {len(class_names)}: correct one.")
        self.class_names = tuple(class_names or map(str, range(num_classes)))
        self.mean, self.std = tuple(mean), tuple(std)
        self.loss = loss or CrossEntropy()
        self.penalties = penalties or Penalties()
        self.max_norm = max_norm or MaxNorm()
        self.make_optimizer = optimizer
        self.schedule = schedule or Schedule()
        self.base_batch_size = base_batch_size
        self.channels_last = channels_last
        self.compile_net = compile
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_metrics = MetricCollection({"val/loss": MeanMetric(), "val/accuracy": accuracy}, compute_groups=False)
        self.test_loss = MeanMetric()
        test: dict[str, Any] = {
            "test/accuracy": accuracy.clone(),
            "test/calibration_error": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            "per_class": MulticlassStatScores(num_classes, average="none", validate_args=False),
        }
        self.test_metrics = MetricCollection(test, compute_groups=False)
        self.distillation: nn.Module | None = None
        """A teacher whose outputs are learned beside the labels, in training only; ``None`` without one."""
        self._is_checked = False
        self._train_sums: Tensor | None = None
        self._gradients: dict[str, Tensor] = {}  # those of a step of the optimizer that a resumed run has begun
        self._steps_per_epoch, self._scale = 0.0, 1.0
        self._plateau_at: tuple[int, int] | None = None  # epoch and batch of the last update of the schedule
        self._schedule_before: dict[str, Any] = {}  # the lengths of the schedule of a run that is resumed
        self.phase: Phase | None = None
        """The part of the run that the next optimizer is for; ``None`` for the whole run."""
        self.surgeries: list[dict[str, Any]] = []
        """All changes of the net's structure as plain values, in their order; checkpoints contain them."""
        self._dense_net: list[nn.Module] = []  # the net before the first surgery; in a list, it is not a submodule

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[N, C, H, W]`` -> logits ``[N, num_classes]``."""
        return self.net(images)

    def check_fit(self, mixed: bool = False) -> None:
        """Try the net, the loss, the penalties and the max-norm. Later calls do nothing.

        Args:
            mixed: whether targets are distributions ``[N, K]`` instead of class numbers ``[N]``.

        Raises:
            ValueError: if the net cannot take the data's images, if it does not give one logit for each class, if the
                loss cannot take the logits and targets, or if penalties or max-norm cannot take the net.
        """
        if not self._is_checked:
            check_net(self.net, self.image_shape, self.num_classes, self.hparams.get("net"))
            check_loss(self.loss, self.num_classes, mixed)
            for argument, ours in (("penalties", Penalties), ("max_norm", MaxNorm)):
                if type(module := getattr(self, argument)) is not ours:
                    check_on_net(argument, module, self.net)
        self._is_checked = True

    def setup(self, stage: str) -> None:
        if self.channels_last:
            channels_last_(self.net)
        if self.compile_net and stage == "fit":
            self.net.compile()

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch. Targets are class numbers ``[N]``, or distributions ``[N, K]`` with MixUp or CutMix."""
        images, targets = batch
        if not len(images):  # all its files were skipped: nothing to learn, in this process
            return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0
        logits = _in_full(self.net(images))
        loss = self.loss(logits, targets)
        self._add_up(loss.detach(), logits.detach(), targets)
        if self.distillation is not None:
            loss = self.distillation(images, logits, loss)
        penalty = self.penalties(self.net)
        return loss if penalty is None else loss + penalty

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.max_norm(self.net)

    def on_train_epoch_start(self) -> None:
        self._train_sums = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch for each batch, so that dropout is a function of (seed, epoch, batch, process).

        A resumed run then repeats the same draws. With ``sync_batchnorm`` all processes have the same seed, as
        :mod:`project.learning.whole_batch` needs.
        """
        # `torch.manual_seed` is slow: it also queues a call, with its stack trace, for each absent kind of device.
        process = 0 if getattr(self.trainer, "sync_batchnorm", False) else self.global_rank
        seed = hash((int(os.environ.get("PL_GLOBAL_SEED", 0)), self.current_epoch, batch_idx, process)) % 2**63
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def on_train_epoch_end(self) -> None:
        if means := self.train_means():
            self._log(means)
        loop = self.trainer.fit_loop.epoch_loop
        if loop._num_ready_batches_reached():
            # Lightning does this after the checkpoint of the epoch, so that a resumed run would miss it.
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)

    def train_means(self) -> dict[str, Tensor]:
        """Mean loss and accuracy over this process's training images since the epoch began; empty before any batch."""
        if self._train_sums is None:
            return {}
        loss, correct, count = self._train_sums
        return {"train/loss": loss / count, "train/accuracy": correct / count}

    def _log(self, values: dict[str, Tensor]) -> None:
        """Log the mean of each value over the processes. A metric that is already synchronised keeps its value."""
        self.log_dict(values, sync_dist=self.trainer.world_size > 1)

    def _add_up(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a batch to the sums of the epoch. They stay on the device, because to read one makes each step wait."""
        labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
        correct = (logits.argmax(dim=1) == labels).sum()
        sums = torch.stack([loss * len(labels), correct.to(loss.dtype), loss.new_tensor(len(labels))])
        self._train_sums = sums if self._train_sums is None else self._train_sums + sums

    # -- validation, test, prediction ----------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Copy the buffers of the first process to all others.

        The first process saves the checkpoint, so its net must be the one that is measured. Without ``sync_batchnorm``
        each process has its own running statistics.
        """
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure plain cross entropy, without smoothing or penalties, so that runs of different losses compare."""
        images, labels = batch
        logits = self._logits(images)
        if len(labels):
            self.val_metrics["val/loss"].update(nn.functional.cross_entropy(logits, labels), len(labels))
            self.val_metrics["val/accuracy"].update(logits, labels)
        return {"logits": logits, "labels": labels}

    def on_validation_epoch_end(self) -> None:
        if self.val_metrics["val/loss"].update_called:
            self._log(self.val_metrics.compute())
        elif not self.trainer.sanity_checking:
            raise ValueError("every validation image was skipped: replace the files that the warnings name.")
        self.val_metrics.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        logits = self._logits(images)
        if len(labels):
            self.test_loss.update(nn.functional.cross_entropy(logits, labels), len(labels))
            self.test_metrics.update(logits.softmax(dim=1), labels)
        return {"logits": logits, "labels": labels}

    def on_test_epoch_end(self) -> None:
        if not self.test_loss.update_called:
            raise ValueError("every test image was skipped: replace the files that the warnings name.")
        values = self.test_metrics.compute()
        correct, *_, counts = values.pop("per_class").T  # a class without test images has no accuracy
        values["test/loss"] = self.test_loss.compute()
        rows = zip(self.class_names, correct, counts, strict=True)
        values |= {f"test/accuracy/{name}": right / count for name, right, count in rows if count}
        self._log(values)
        self.test_metrics.reset()
        self.test_loss.reset()

    def predict_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Probabilities ``[N, K]``. Images of uint8 are normalised here; float images must be normalised already."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        logits = self._logits(self.normalize(images) if images.dtype == torch.uint8 else images)
        return logits.float().softmax(dim=1)

    def _logits(self, images: Tensor) -> Tensor:
        """The logits in full precision. A batch may be empty, if all its files were skipped; few nets can take that."""
        return _in_full(self.net(images)) if len(images) else images.new_empty(0, self.num_classes)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalised float images, by the classifier's mean and standard deviation.

        Args:
            images: images ``[N, C, H, W]`` uint8.
        """
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() / 255 - mean) / std

    # -- optimizer -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(self.parameter_groups())
        scale = self._lr_scale()
        if self.base_batch_size is not None:
            log.info("linear scaling rule: the learning rate is multiplied by %g", scale)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale * (self.phase.lr_factor if self.phase else 1.0)
        if self.trainer.train_dataloader is None:  # Lightning does not count the batches if the run has no last epoch
            self.trainer.fit_loop.setup_data()
        total_steps = self.trainer.estimated_stepping_batches
        steps_per_epoch = total_steps / max(self.trainer.max_epochs or 1, 1)
        if self.trainer.max_epochs in (None, -1) or self.trainer.max_steps > 0:  # the epochs do not give total_steps
            steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        first_step = 0
        if self.phase is not None:  # the schedule has the length of the phase, not of the run
            total_steps = round(self.phase.epochs * steps_per_epoch)
            first_step = round(self.phase.first_epoch * steps_per_epoch)
        scheduler = self.schedule.build(optimizer, total_steps, steps_per_epoch, scale, first_step)
        before = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch} | self._schedule_before
        if hasattr(scheduler["scheduler"], "total_steps") and (
            before["total_steps"] != scheduler["scheduler"].total_steps or before["steps_per_epoch"] != steps_per_epoch
        ):
            raise ValueError(
                f"the schedule {type(self.schedule).__name__} was made for {before['total_steps']} steps, "
                f"{before['steps_per_epoch']:g} an epoch, and cannot continue in a run of {total_steps}, "
                f"{steps_per_epoch:g} an epoch: resume with the same epochs, batch size and devices, or choose Linear "
                "or Cosine."
            )
        self._steps_per_epoch, self._scale = steps_per_epoch, scale
        if scheduler.get("monitor", "").startswith("val/"):  # an epoch without a validation has no new value
            scheduler["frequency"] = self.trainer.check_val_every_n_epoch or 1
            self._check_validates(scheduler["monitor"])
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # type: ignore[return-value]

    def _check_validates(self, monitor: str) -> None:
        """Refuse a schedule that follows a metric of the validation if no epoch ends with one."""
        trainer = self.trainer
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        if not (trainer.enable_validation and any(trainer.num_val_batches) and trainer.check_val_every_n_epoch):
            raise ValueError(
                f"the schedule {type(self.schedule).__name__} follows {monitor}, but no epoch ends with a validation: "
                "set data.val_fraction, trainer.limit_val_batches and trainer.check_val_every_n_epoch above 0, or let "
                "model.schedule.init_args.monitor be train/loss."
            )

    def on_train_start(self) -> None:
        """Go on within a step of the optimizer, and at the place of the schedule, also if the length has changed."""
        resumed, before = self._schedule_before, self._schedule_before.get("steps_per_epoch", self._steps_per_epoch)
        self._schedule_before, self._plateau_at = {}, None
        for name, of_all in self._gradients.items():
            self.get_parameter(name).grad = of_all[self.global_rank].to(self.device)
        self._gradients = {}
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if not resumed or type(scheduler) is not LambdaLR:
                continue
            scheduler.last_epoch = round(scheduler.last_epoch * self._steps_per_epoch / before)
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate
        if before != self._steps_per_epoch:
            now = self._steps_per_epoch
            log.info("an epoch has %g steps and had %g: the schedule goes on at the same share", now, before)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Update a schedule that follows a metric once at most for each batch.

        If a ``GradientAccumulationScheduler`` changes the number k of batches of a step, a step counts as k steps.
        """
        place = (self.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx)
        if metric is not None and place == self._plateau_at:
            return
        self._plateau_at = place
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(scheduler, LambdaLR | OneCycleLR) and any(
            isinstance(callback, GradientAccumulationScheduler) for callback in callbacks
        ):
            scheduler.last_epoch += place[1] % self.trainer.accumulate_grad_batches
        super().lr_scheduler_step(scheduler, metric)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's two groups of parameters: weights, and norms and biases, which have no weight decay."""
        weights = [p for p in self.parameters() if p.dim() > 1 and p.requires_grad]
        others = [p for p in self.parameters() if p.dim() <= 1 and p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _lr_scale(self) -> float:
        """The factor of the linear scaling rule: global batch size / batch size that the rate is meant for."""
        if self.base_batch_size is None:
            return 1.0
        batch_size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches / self.base_batch_size

    # -- surgery -------------------------------------------------------------------------------------------------

    def operate_(self, surgery: Surgery) -> None:
        """Change the net's structure, and append the change to ``surgeries``.

        Args:
            surgery: change of structure, planned for the net as it is now.
        """
        if not self._dense_net:
            self._dense_net = [deepcopy(self.net)]
        surgery.apply_(self.net)
        self.surgeries = [*self.surgeries, to_plain(surgery)]

    def _follow_surgeries(self, wanted: list[dict[str, Any]]) -> None:
        """Give the net the structure that it has after the ``wanted`` surgeries."""
        done = len(self.surgeries)
        if wanted[:done] != self.surgeries:  # a surgery cannot be undone: begin again with the dense net
            self.net, done = self._dense_net.pop().to(self.device), 0
        if wanted[done:]:
            if not self._dense_net:
                self._dense_net = [deepcopy(self.net)]
            replay_(self.net, wanted[done:])
        self.surgeries = list(wanted)

    # -- checkpoint ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """PyTorch's method. Weights from a process that has changed the net bring the ``surgeries`` with them."""
        if "surgeries" in state_dict:
            state_dict = copy(state_dict)  # with the versions of its modules
            self._follow_surgeries(state_dict.pop("surgeries"))  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "Classifier":
        """Lightning's ``load_from_checkpoint``. If ``net`` is not given, it is built as the command line built it.

        A checkpoint of somebody else's run may name classes of known packages only; see :mod:`project.frame.trust`.

        Args:
            checkpoint_path: path of the checkpoint, or an open file.
            args: other positional arguments of Lightning's method.
            kwargs: other keyword arguments of Lightning's method, such as ``net`` or ``map_location``.
        """
        from project.frame.trust import check_trusted, is_own

        if isinstance(checkpoint_path, str | os.PathLike):
            values = (check_checkpoint(checkpoint_path) or {}).get("hyper_parameters", {})
            if not is_own(Path(checkpoint_path).resolve().parent.parent / "config.yaml"):
                check_trusted(values, str(checkpoint_path))
            if "net" not in kwargs and values.get("net"):
                kwargs["_instantiator"] = _INSTANTIATOR
        with refused_if_damaged():
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["surgeries"], checkpoint["steps_per_epoch"] = self.surgeries, self._steps_per_epoch
        checkpoint["lr_scale"] = self._scale
        checkpoint.update(one_object_each(checkpoint))
        trainer = self._trainer
        if trainer is None or self._train_sums is None:
            return
        # The means of this epoch go on in a resumed run, if its end is still to come.
        checkpoint["train_sums"] = _of_all(self._train_sums, trainer.world_size)
        if trainer.fit_loop.epoch_loop._should_accumulate():  # between two steps of the optimizer
            gradients = {name: weight.grad for name, weight in self.named_parameters() if weight.grad is not None}
            checkpoint["gradients"] = {name: _of_all(each, trainer.world_size) for name, each in gradients.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the net the structure that the weights belong to.

        Raises:
            ValueError: if the weights belong to another net, or their classes are others or in another order. The
                message is one sentence instead of torch's list of all keys. Only a fit with ``weights`` moves to other
                classes.
        """
        self._follow_surgeries(checkpoint.get("surgeries", []))
        if checkpoint.get("lr_schedulers") and self._trainer is not None and self._trainer.state.fn == "fit":
            _multiply_rates_(checkpoint, self._lr_scale() / checkpoint.get("lr_scale", self._lr_scale()))
            self._schedule_before = {
                "steps_per_epoch": checkpoint.get("steps_per_epoch"),
                "total_steps": checkpoint["lr_schedulers"][0].get("total_steps"),
            }
            self._schedule_before = {key: value for key, value in self._schedule_before.items() if value}
            self._gradients = checkpoint.get("gradients", {})
        if (sums := checkpoint.get("train_sums")) is not None and self.global_rank < len(sums):
            self._train_sums = sums[self.global_rank].to(self.device)
        problem = mismatch(self.state_dict(), checkpoint.get("state_dict", {}))
        if problem:
            raise ValueError(
                f"the checkpoint belongs to another net ({problem}): give the configuration that it was trained with, "
                "as `--run DIR` does, or another checkpoint."
            )
        names = checkpoint.get("hyper_parameters", {}).get("class_names") or ()
        wrong = next((pair for pair in zip(names, self.class_names, strict=False) if pair[0] != pair[1]), None)
        if wrong and self.hparams.get("class_names"):
            raise ValueError(
                f"where the checkpoint has class {wrong[0]}, the data have {wrong[1]}: give the data that it was "
                "trained on, or begin a fit with its --weights."
            )


def _of_all(part: Tensor, world_size: int) -> Tensor:
    """A copy of a process's tensor, with those of all other processes in a new first dimension."""
    return gather(part[None]) if world_size > 1 else part[None].clone()


def _multiply_rates_(checkpoint: dict[str, Any], factor: float) -> None:
    """Multiply the learning rates of a checkpoint, for a resumed run with another factor of the linear scaling rule."""
    for group in [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]:
        group.update({key: group[key] * factor for key in ("lr", "initial_lr") if key in group})
    for state in checkpoint["lr_schedulers"]:
        state.update({key: [rate * factor for rate in state[key]] for key in ("base_lrs",) if key in state})


def instantiate(kind: type[LightningModule], config: dict[str, Any]) -> LightningModule:
    """Build the classifier that the hyperparameters of a checkpoint describe. Lightning calls this when it loads one.

    Args:
        kind: class whose ``load_from_checkpoint`` was called; for LightningModule it is a classifier that is built.
        config: arguments of the classifier. A net that is described and not given is built as the command line does.
    """
    from project.frame.net_arguments import build_net
    from project.frame.trust import check_trusted

    described = config.get("net")
    if not issubclass(kind, Classifier):  # which knows runs of one's own by their path
        check_trusted(described, "a checkpoint that is not loaded by Classifier.load_from_checkpoint")
    net = build_net(described) if isinstance(described, Mapping) else described
    module = instantiate_module(kind if issubclass(kind, Classifier) else Classifier, config | {"net": net})
    if net is not described:
        module.hparams["net"] = described
    return module


_INSTANTIATOR = f"{__name__}.{instantiate.__name__}"
_allowed: set[str] = getattr(saving, "_ALLOWED_INSTANTIATORS", set())
_allowed.add(_INSTANTIATOR)  # Lightning calls no other functions that a checkpoint names


def _in_full(logits: Tensor) -> Tensor:
    """The logits in float32 at least, because mixed precision computes the loss in float32 too."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _keep_plain_(hparams: MutableMapping[str, Any]) -> None:
    """Drop values that are not plain (a net built in Python), so that checkpoints load with ``weights_only=True``."""
    for key in [key for key, value in hparams.items() if not _is_plain(value)]:
        del hparams[key]


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
