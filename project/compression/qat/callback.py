"""Quantization-aware training: the last epochs run with weights and activations rounded to few bits.

The mathematics and its papers are in :mod:`project.compression.qat.fake_quantization`.
"""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from project.callbacks.checkpoint import forget_best
from project.compression.plain_layers import name_layers
from project.compression.qat.fake_quantization import FakeQuantization
from project.compression.saved_epochs import check_saved
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)


class QuantizationAwareTraining(Callback):
    """Trains the last epochs with weights and activations rounded to few bits, so that the net adapts to the rounding.

    Only the forward pass rounds: in training and, when the ranges are known, in validation. So ``best.ckpt`` is the
    epoch that is best after rounding. The structure of the net, its checkpoints and its keys do not change. To write
    the quantized file, put :class:`~project.callbacks.PostTrainingQuantization` after this callback, with a quantizer
    of the same number of bits. To continue from a trained net, set ``--ckpt_path`` to its ``best.ckpt`` and choose a
    larger ``trainer.max_epochs``: the learning rate schedule continues.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.QuantizationAwareTraining
              init_args: {begin_epoch: 25}
            - class_path: project.callbacks.PostTrainingQuantization

    Args:
        begin_epoch: first epoch that rounds, counted from 0; 0 or more, best well after half of the training. None
            rounds from the first epoch of the fit on, which is meant for a trained net.
        weight_bits: number of bits of the weights, 2 to 8.
        activations: whether to round the inputs of the layers too, to eight bits.
        reduce_range: whether to round the weights as ``Quantizer.reduce_range`` does. Choose the same value for both.

    Raises:
        ValueError: if a number is outside its range.
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
        if not isinstance(pl_module, Classifier):
            raise ValueError(
                f"the model is a {type(pl_module).__name__}, but QuantizationAwareTraining needs a Classifier."
            )
        ends = trainer.max_epochs is not None and 0 < trainer.max_epochs <= (self.begin_epoch or 0)
        if ends and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"begin_epoch is {self.begin_epoch}, but training ends after {trainer.max_epochs} epochs: begin "
                "earlier, or train longer."
            )
        check_saved(trainer, self.begin_epoch or 0)
        if left := self.fake.left_out(pl_module.net, pl_module.image_shape):
            log.warning("these layers are not rounded in training: %s", name_layers(left))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch >= (self.begin_epoch or 0) and not self.begun:  # begun: a resumed run
            self.begun = True
            forget_best(trainer)  # float epochs are not compared with rounded ones

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._attach(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._attach(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the plain forward methods, so that other callbacks can copy or prune the net between epochs."""
        self.fake.detach_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.fake.detach_()

    def _attach(self, module: LightningModule) -> None:
        """Let the net round in its forward pass, once ``begin_epoch`` is reached."""
        assert isinstance(module, Classifier)
        if self.begun:
            self.fake.attach_(module.net)

    def state_dict(self) -> dict[str, object]:
        return {"ranges": self.fake.ranges, "begun": self.begun}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.fake.ranges = dict(state_dict["ranges"])  # type: ignore[call-overload]
        self.begun = bool(state_dict["begun"])
