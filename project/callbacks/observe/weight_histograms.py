"""Writes histograms of the weights and the norm of each gradient to TensorBoard, every few epochs."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from project.callbacks.places import tensorboard


class WeightHistograms(Callback):
    """Writes ``weights/<name>`` and ``gradient_norm/<name>`` at the first step of every n-th epoch.

    The weights are also written at the end of training. The gradients are those of one batch, before clipping.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.WeightHistograms
              init_args: {every_n_epochs: 1}

    Args:
        every_n_epochs: number of epochs from one histogram to the next, 1 or more.

    Raises:
        ValueError: if ``every_n_epochs`` is below 1.
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs is {every_n_epochs}, but it counts epochs: choose 1 or more.")
        self.every_n_epochs = every_n_epochs
        self._due = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = trainer.current_epoch % self.every_n_epochs == 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._due:
            return
        self._due = False
        _write_weights(trainer, pl_module)
        _write_gradient_norms(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _write_weights(trainer, pl_module)


def _write_weights(trainer: Trainer, module: LightningModule) -> None:
    if (writer := tensorboard(trainer)) is None:
        return
    for name, weight in _weights(module).items():
        if weight.isfinite().all():  # TensorBoard raises an error otherwise; StopOnNaN ends such a run
            writer.add_histogram(f"weights/{name}", weight.detach().float(), trainer.global_step)


def _write_gradient_norms(trainer: Trainer, module: LightningModule) -> None:
    if (writer := tensorboard(trainer)) is None:
        return
    gradients = {name: weight.grad for name, weight in _weights(module).items() if weight.grad is not None}
    if not gradients:
        return
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))]).tolist()
    for name, norm in zip(gradients, norms, strict=True):
        writer.add_scalar(f"gradient_norm/{name}", norm, trainer.global_step)


def _weights(module: LightningModule) -> dict[str, Tensor]:
    """Weights of convolutions and linear layers: the parameters with two or more dimensions."""
    named = module.named_parameters()
    return {
        name.replace("_orig_mod.", "").removesuffix(".weight"): weight for name, weight in named if weight.dim() > 1
    }
