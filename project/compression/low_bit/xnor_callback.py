"""XNOR-Net: binary weights and binary inputs, trained through both roundings.

Rastegari et al. 2016 (arXiv:1603.05279); the mathematics is in :mod:`project.compression.low_bit.xnor`.
"""

import logging
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from project.compression.low_bit.ternary_callback import TernaryWeights
from project.compression.low_bit.xnor import BinarizeInputs, BinaryInput, count_sign_macs
from project.learning.classifier import Classifier, Phase
from project.metrics.complexity import count_macs

log = logging.getLogger(__name__)


class XNORNet(TernaryWeights):
    """Trains with binary weights and binary inputs in convolutions and linear layers; stem and head stay float.

    When it begins, each of the layers gets a norm and a sign in front of it, and optimizer and learning-rate schedule
    begin anew. Otherwise as :class:`~project.callbacks.TernaryWeights`: ``level_0.ckpt`` is the float net before,
    ``best.ckpt`` and ``level_1.ckpt`` hold binary weights. The file is small; no engine here runs it faster.

    Args:
        begin_epoch: the first epoch, from 0, with signs; at 0 what is made binary is what the fit begins with: random
            weights, or those of ``--ckpt_path``.
        input_scale: multiply each layer's output by ``K``, the mean size of its inputs in each window (eq. 11).
        include: regular expressions on layer names, searched as in ``re.search``; null is all layers.
        exclude: likewise; null is the stem's first and the last layer.
        report: add a row to ``report.csv`` and ``report.md``.

    Raises:
        ValueError: for a negative ``begin_epoch``.
    """

    def __init__(
        self,
        begin_epoch: int = 0,
        input_scale: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        report: bool = True,
    ) -> None:
        super().__init__("bwn", begin_epoch, include=include, exclude=exclude, report=report)
        self.step = "xnor"
        self.input_scale = input_scale
        self.begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        if trainer.world_size > 1:
            raise ValueError(
                f"there are {trainer.world_size} processes, but they would not average the gradients of the norms that "
                "XNORNet adds: train with trainer.devices: 1."
            )
        assert isinstance(pl_module, Classifier)
        self.begun = False
        pl_module.phase = self._phase(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The layers of the net as its checkpoint has left it."""
        assert isinstance(pl_module, Classifier) and self.low_bit is not None
        self.low_bit.layers = self._layers(pl_module.net)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self.begun or trainer.current_epoch < self.begin_epoch:
            return
        assert isinstance(pl_module, Classifier) and self.low_bit is not None
        inside = {f"{name}.layer" for name, module in pl_module.net.named_modules() if isinstance(module, BinaryInput)}
        if floats := [name for name in self.low_bit.layers if name not in inside]:
            pl_module.operate_(BinarizeInputs(floats, self.input_scale))
            self.low_bit.layers = [name if name in inside else f"{name}.layer" for name in self.low_bit.layers]
        self.begun = True
        pl_module.phase = self._phase(trainer)
        trainer.strategy.setup_optimizers(trainer)
        shape = pl_module.image_shape
        share = count_sign_macs(pl_module.net, shape) / count_macs(pl_module.net, shape)
        log.info("%d layers multiply signs: %.1f %% of the multiply-accumulates", len(self.low_bit.layers), 100 * share)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            pl_module.phase = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"begun": self.begun}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The optimizer that is made next is that of the checkpoint's part of the run."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.training and state is not None and isinstance(pl_module, Classifier):
            self.begun = state["begun"]
            pl_module.phase = self._phase(trainer)

    def _phase(self, trainer: Trainer) -> Phase | None:
        """The schedule is stretched over each part of the run by itself."""
        epochs = trainer.max_epochs or 0
        if epochs < 1:
            return None
        return Phase(epochs - self.begin_epoch if self.begun else max(self.begin_epoch, 1))
