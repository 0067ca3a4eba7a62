"""What all callbacks of this folder share: when they measure, on what, and where the numbers go."""

import logging
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from project.callbacks.places import show_figure
from project.metrics.probes.objective import LossOnImages, fixed_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Mode = Literal["train", "eval"]


class Probe(Callback):
    """Base class of callbacks that measure the loss landscape during a fit, and when it ends.

    A measurement in the fit is made before a step. It runs the plain net on the same training images every time,
    without augmentation, with the loss of the run (without distillation and penalties), and leaves everything
    unchanged: a run ends with the same bits as one without the probe. With EMA, the averages are measured at the end if
    the probe stands after it in the list, and else the raw weights. In several processes each measures the same.

    The numbers go to ``metrics.csv`` and TensorBoard as ``probe/…``, at the number of steps that were taken before. A
    run may have two probes of a kind, if their mode (or subspace) differs, so that their numbers have different names.
    The log says once what a measurement costs. A checkpoint holds what was measured, for the picture at the end.

    Args:
        every_n_steps: number of optimizer steps from one measurement to the next, 1 or more. ``None`` measures at no
            step.
        every_n_epochs: number of epochs from one measurement to the next, 1 or more, each at the epoch's first step.
            ``None`` measures at no epoch.
        num_images: number of training images to measure on, 1 or more, all in one batch.
        mode: mode of the net. ``"train"``: batch norm takes the statistics of the images, and dropout is on, with the
            same mask in all measurements. ``"eval"``: batch norm takes the running statistics, and dropout is off.

    Raises:
        ValueError: if a number is outside its range, or if the data module gives no training images.
    """

    picture = ""
    """Name of the picture in TensorBoard and in the run's folder; empty for none."""
    usual_mode: Mode = "train"
    """Mode whose numbers have the plain name. Those of the other mode go to ``probe/<mode>/…``."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_images: int = 256,
        mode: Mode = "train",
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: choose 1 or more, or null to measure when the fit ends only.")
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, but it counts images to measure on: choose 1 or more.")
        if mode not in ("train", "eval"):
            raise ValueError(f"mode is {mode!r}: choose train or eval.")
        self.every_n_steps, self.every_n_epochs, self.num_images, self.mode = (
            every_n_steps,
            every_n_epochs,
            num_images,
            mode,
        )
        self.history: dict[int, dict[str, float]] = {}
        """What was measured: values by name, for each number of steps that were taken before."""
        self._batch: tuple[Tensor, Tensor] | None = None
        self._has_told = self._has_ended = False

    @abstractmethod
    def _values(self, objective: LossOnImages) -> dict[str, float]:
        """One measurement: values by the names that they are logged with. Everything is put back afterwards.

        Args:
            objective: loss of the run's net on the images.
        """

    def _draw(self) -> "Figure":
        """The picture of :attr:`history`, for a class that has the name of one."""
        raise NotImplementedError

    @property
    def state_key(self) -> str:
        """Two probes of one kind may measure differently in one run."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "history"}
        return self._generate_state_key(**own)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        name, data = type(self).__name__, getattr(trainer, "datamodule", None)
        if not hasattr(data, "sample"):
            raise ValueError(
                f"{name} measures on training images, but {type(data).__name__} gives none: let the data module be a "
                "subclass of project.data.ImageDataModule."
            )
        self.history, self._has_told, self._has_ended = {}, False, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what the logs of a resumed run forget too."""
        self.history = {step: values for step, values in self.history.items() if step < trainer.global_step}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step in self.history:  # between two batches of one step
            return
        at_step = self.every_n_steps is not None and step % self.every_n_steps == 0
        at_epoch = (
            self.every_n_epochs is not None and batch_idx == 0 and trainer.current_epoch % self.every_n_epochs == 0
        )
        if at_step or at_epoch:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)  # a resumed run that had nothing left to train

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._batch = None

    def _end(self, trainer: Trainer, module: Any) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._measure(trainer, module)
        if self.picture:
            name = self.picture if self.mode == self.usual_mode else f"{self.picture}_{self.mode}"
            show_figure(trainer, name, self._draw())

    def _measure(self, trainer: Trainer, module: Any) -> None:
        start = time.perf_counter()
        objective = self._objective(trainer, module)
        with objective.measuring(self.mode):
            values = self._values(objective)
        self.history[trainer.global_step] = values
        prefix = "probe" if self.mode == self.usual_mode else f"probe/{self.mode}"
        row = {"epoch": trainer.current_epoch, **{f"{prefix}/{name}": value for name, value in values.items()}}
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step)
        if not self._has_told:
            self._has_told = True
            log.info(
                "%s: a measurement takes %d forward and %d backward passes of %d images, %.2g s here",
                type(self).__name__,
                objective.num_forward,
                objective.num_backward,
                len(objective.images),
                time.perf_counter() - start,
            )

    def _objective(self, trainer: Any, module: Any) -> LossOnImages:
        device = next(module.net.parameters()).device
        if self._batch is None or self._batch[0].device != device:
            images, labels = fixed_images(trainer.datamodule, self.num_images)
            images = trainer.datamodule._for_net(images)
            self._batch = images.to(device), labels.to(device)
        return LossOnImages(module.net, module.loss, *self._batch)
