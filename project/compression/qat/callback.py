"""Training with weights and activations rounded to few bits, by :mod:`project.compression.qat.fake_quantization`."""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.checkpoint import forget_best
from project.compression.qat.fake_quantization import FakeQuantization
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)


class QuantizationAwareTraining(Callback):
    """Trains the last epochs with weights and activations rounded to few bits, so that the net gets used to it.

    Structure, checkpoints and keys stay those of the plain net: the rounding is in the forward pass alone, of training
    and, once ranges are known, of validation, so that ``best.ckpt`` is the best net of these epochs as it will be
    rounded. :class:`PostTrainingQuantization` after it writes the file, with a quantizer of as many bits. A fit that
    begins with a trained net (``--ckpt_path`` its ``best.ckpt``) and a larger ``trainer.max_epochs`` goes on in the
    schedule.

    Args:
        begin_epoch: the first epoch, from 0, that rounds, well after half of the training; null rounds from the fit's
            first one on, for a trained net.
        weight_bits: 2 to 8.
        activations: round the layers' inputs to eight bits too.
        reduce_range: round the weights as ``Quantizer.reduce_range`` does; choose the same value for both.

    Raises:
        ValueError: for numbers out of their range.
    """

    stages = ("integer training",)

    def __init__(
        self,
        begin_epoch: int | None = None,
        weight_bits: int = 8,
        activations: bool = True,
        reduce_range: bool = True,
    ) -> None:
        if begin_epoch is not None and begin_epoch < 0:
            raise ValueError(f"begin_epoch is {begin_epoch}: choose 0 or more, or null.")
        self.begin_epoch = begin_epoch
        self.fake = FakeQuantization(weight_bits, activations, reduce_range)
        self.begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.begun = False
        if trainer.max_epochs is not None and 0 < trainer.max_epochs <= (self.begin_epoch or 0):
            raise ValueError(
                f"begin_epoch is {self.begin_epoch}, but training ends after {trainer.max_epochs} epochs: begin before."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch >= (self.begin_epoch or 0) and not self.begun:  # else it is a run resumed after it
            self.begun = True
            forget_best(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._attach(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._attach(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between epochs the net is a plain one, which other callbacks may copy or prune."""
        self.fake.detach_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.fake.detach_()

    def _attach(self, module: LightningModule) -> None:
        assert isinstance(module, Classifier)
        if self.begun:
            self.fake.attach_(module.net)

    def state_dict(self) -> dict[str, object]:
        return {"ranges": self.fake.ranges, "begun": self.begun}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.fake.ranges = dict(state_dict["ranges"])  # type: ignore[call-overload]
        self.begun = bool(state_dict["begun"])
