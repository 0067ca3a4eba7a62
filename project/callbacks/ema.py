"""Exponential moving average of the weights, for validation, test and the saved model.

Polyak & Juditsky 1992, Acceleration of stochastic approximation by averaging; the running average of Szegedy et al.
2015 (arXiv:1512.00567, sec. 8). The warm-up of the decay, ``min(decay, (1 + t) / (10 + t))``, keeps the first, bad
weights from lingering in a short run. Batch norm's running statistics are averaged with the weights they belong to.

A checkpoint's ``state_dict`` holds the averaged weights, so that every verb takes them; the raw ones lie beside it
and a resumed run goes on from those.

Lightning's ``EMAWeightAveraging`` (2.6.6) does the same sum, but until its start step it validates and saves the
untrained weights, its weights-only checkpoints hold the raw ones, and an update of a small Inception (190 k
parameters, 182 tensors) took 10.7 ms on one CPU core against 0.25 ms here.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

_RAW = "ema_raw_weights"


class EMA(Callback):
    """``average = d * average + (1 - d) * weight`` after each optimizer step, starting from the weights of the first
    one.

    Who keeps some weights at zero (a pruning mask) must do so to the averages as well (:meth:`mask_`). Layers may be
    replaced between epochs; a tensor of a new name or shape starts a new average.

    Args:
        decay: d, in [0, 1); 0.999 averages about the last 1000 steps.
        warmup: d is ``min(decay, (1 + t) / (10 + t))`` at update t.
        start_step: optimizer steps before the average begins; until then the raw weights are validated and saved.

    Raises:
        ValueError: for a decay outside [0, 1), a negative start, or checkpoints without the training state.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, but the share of the old average lies in [0, 1): choose about 0.999.")
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}, but it counts optimizer steps: choose 0 or more.")
        self.decay, self.warmup, self.start_step = decay, warmup, start_step
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {}
        """Averages by the names of the LightningModule's parameters and buffers; while the averages are in the net
        (validation, end of training), the raw weights."""
        self._live: list[Tensor] | None = None  # the net's tensors, in the order of averages
        self._swapped = False
        self._last_step = 0

    def decay_at(self, update: int) -> float:
        """d of the update with this number; the first, number 0, copies the weights."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    def restart(self) -> None:
        """Begin anew with the next step's weights."""
        self.averages, self._live, self.num_updates, self._swapped = {}, None, 0, False

    @torch.no_grad()
    def mask_(self, masks: Mapping[str, Tensor]) -> None:
        """Keep averages at zero where the weights are.

        Args:
            masks: by the names of :attr:`averages`, 0 or 1, broadcast.
        """
        for name, mask in masks.items():
            if name in self.averages:
                self.averages[name].mul_(mask)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.restart()
        checkpoints = (each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint))
        if any(each.save_weights_only for each in checkpoints):
            raise ValueError(  # Lightning calls no callback then, so the raw weights would be saved
                "save_weights_only is true, but such checkpoints would hold the raw weights instead of EMA's averages: "
                "set it to false."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._live = None  # layers may have been replaced since the last epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step or step <= self.start_step:  # gradients are being accumulated, or too early
            return
        self._last_step = step
        self._update(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, averages_in=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, averages_in=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, averages_in=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap(pl_module, averages_in=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.averages, self._live, self._swapped = {}, None, False

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_updates = state_dict["num_updates"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.averages:
            return
        swapped = self._swapped
        self._swap(pl_module, averages_in=False)
        checkpoint[_RAW] = {name: tensor.detach().clone() for name, tensor in _tensors(pl_module).items()}
        self._swap(pl_module, averages_in=True)
        checkpoint["state_dict"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self._swap(pl_module, averages_in=swapped)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The net already holds ``state_dict``, which are the averages; put the raw weights back for training."""
        if trainer.state.fn != TrainerFn.FITTING or _RAW not in checkpoint:
            return
        tensors = _tensors(pl_module)
        self.averages = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(checkpoint[_RAW][name])

    @torch.no_grad()
    def _update(self, module: LightningModule) -> None:
        live = self._follow(module)
        if self.num_updates:
            torch._foreach_lerp_(list(self.averages.values()), live, 1 - self.decay_at(self.num_updates))
        self.num_updates += 1

    @torch.no_grad()
    def _swap(self, module: LightningModule, averages_in: bool) -> None:
        """Exchange the net's weights and the averages where they are not yet as asked; by copy, so that they stay
        put.
        """
        if self._swapped == averages_in or not self.averages:
            return
        live = self._follow(module)
        kept = [tensor.clone() for tensor in live]
        torch._foreach_copy_(live, list(self.averages.values()))
        torch._foreach_copy_(list(self.averages.values()), kept)
        self._swapped = averages_in

    def _follow(self, module: LightningModule) -> list[Tensor]:
        """The net's tensors, each with an average on its device; a tensor that has none begins one."""
        if self._live is None:
            tensors = _tensors(module)
            old, self.averages = self.averages, {}
            for name, tensor in tensors.items():
                fits = name in old and old[name].shape == tensor.shape
                self.averages[name] = old[name].to(tensor.device) if fits else tensor.detach().clone()
            self._live = [tensor.detach() for tensor in tensors.values()]
        return self._live


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    """All floating-point parameters and buffers by name, shared ones once; names are the same under
    ``torch.compile``.
    """
    named = chain(module.named_parameters(), module.named_buffers())
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named if tensor.is_floating_point()}
