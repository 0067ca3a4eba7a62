"""XNOR-Net: training with binary weights and binary inputs.

Rastegari et al. 2016 (arXiv:1603.05279); the mathematics is in :mod:`project.compression.low_bit.xnor`.
"""

import logging
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from project.compression.low_bit.ternary_callback import TernaryWeights
from project.compression.low_bit.xnor import BinarizeInputs, BinaryInput, count_sign_macs
from project.compression.plain_layers import check_plain
from project.learning.classifier import Classifier, Phase
from project.metrics.complexity import count_macs

log = logging.getLogger(__name__)


class XNORNet(TernaryWeights):
    """Trains with binary weights and binary inputs in convolutions and linear layers.

    By default the first and the last layer stay float. At ``begin_epoch`` each other layer gets a norm and a sign
    before it, and the optimizer and the learning rate schedule start again. The checkpoints are those of
    :class:`~project.callbacks.TernaryWeights`: ``level_0.ckpt`` is the float net before ``begin_epoch``, and
    ``best.ckpt`` and ``level_1.ckpt`` hold binary weights. The file is small, but no engine here runs the net faster.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.XNORNet
              init_args: {begin_epoch: 10}

    Args:
        begin_epoch: first epoch with binary weights and inputs, counted from 0; 0 or more. At 0 the fit starts binary,
            from random weights or from those of ``--ckpt_path``.
        input_scale: whether to multiply each layer's output by ``K``, the mean magnitude of its inputs in each window
            (eq. 11).
        include: regular expressions; a layer becomes binary if one is found in its name (``re.search``). None means all
            layers.
        exclude: regular expressions; a layer stays float if one is found in its name. None means the first and the last
            layer.
        report: whether to add a row to ``report.csv`` and ``report.md``.

    Raises:
        ValueError: if ``begin_epoch`` is negative.
    """

    company = replace(
        TernaryWeights.company,
        never={
            **TernaryWeights.company.never,
            "averaged weights": "Lightning's average does not follow the norms that are added: use "
            "project.callbacks.EMA",
        },
    )

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
                f"the run has {trainer.world_size} processes, but they would not average the gradients of the norms "
                "that XNORNet adds: set trainer.devices: 1."
            )
        assert isinstance(pl_module, Classifier)
        self.begun = False
        pl_module.phase = self._phase(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self.begun or trainer.current_epoch < self.begin_epoch:
            return
        assert isinstance(pl_module, Classifier) and self.low_bit is not None
        inside = {f"{name}.layer" for name, module in pl_module.net.named_modules() if isinstance(module, BinaryInput)}
        # A run that continues from a binary net has these layers wrapped already: only the others are wrapped.
        if floats := [name for name in self.low_bit.layers if name not in inside]:
            pl_module.operate_(BinarizeInputs(floats, self.input_scale))
            self.low_bit.layers = [name if name in inside else f"{name}.layer" for name in self.low_bit.layers]
        self.begun = True
        pl_module.phase = self._phase(trainer)
        trainer.strategy.setup_optimizers(trainer)
        shape = pl_module.image_shape
        share = count_sign_macs(pl_module.net, shape) / count_macs(pl_module.net, shape)
        log.info("%d layers are binary: %.1f %% of the multiply-accumulates", len(self.low_bit.layers), 100 * share)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            pl_module.phase = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do what ``teardown`` does, which Lightning does not call after an error."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"begun": self.begun}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Choose the schedule of the part of the run, float or binary, that the checkpoint was written in.

        Lightning creates the run's optimizer and schedule after this hook.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.training and state is not None and isinstance(pl_module, Classifier):
            self.begun = state["begun"]
            pl_module.phase = self._phase(trainer)

    def _layers(self, net: nn.Module) -> list[str]:
        layers = super()._layers(net)
        check_plain(net, layers, type(self).__name__)
        return layers

    def _phase(self, trainer: Trainer) -> Phase | None:
        """The phase of the present part of the run, float or binary: each part has a whole schedule of its own."""
        epochs = trainer.max_epochs or 0
        if epochs < 1:
            return None
        return Phase(epochs - self.begin_epoch if self.begun else max(self.begin_epoch, 1))
