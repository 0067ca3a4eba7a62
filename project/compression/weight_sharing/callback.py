"""Weight sharing after training and pruning: each layer keeps a few different weight values, which are trained further.

Han, Mao & Dally 2016, Deep Compression (arXiv:1510.00149, sec. 3); the mathematics is in
:mod:`project.compression.weight_sharing.codebook`. While the shared values are trained, batch norm uses the statistics
of the batch, as in any training. Norms are folded only at the end: in the finished checkpoint they are a scale and a
shift, and these and the biases are rounded (:mod:`project.compression.norm_folding`). If the norms were folded earlier,
the net would train without the normalisation that it was trained with.
"""

import logging
import math
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from project.callbacks.checkpoint import forget_best, keep_best_as
from project.callbacks.ema import EMA
from project.callbacks.places import run_of
from project.compression.company import stages_of
from project.compression.norm_folding import fold_norms_, reestimate_statistics_, round_vectors_
from project.compression.report import Step, add_step_row, report_steps
from project.compression.weight_sharing.bit_budget import choose_bits, estimated_bytes, measure_options
from project.compression.weight_sharing.checks import COMPANY, check_sharing
from project.compression.weight_sharing.codebook import Codebook, Sharer
from project.data import ImageDataModule
from project.frame.paths import Run
from project.learning.checkpoints import fresh_checkpoint, save_checkpoint, with_weights
from project.learning.classifier import Classifier, Phase

log = logging.getLogger(__name__)

_FINISHED = "weight_sharing"
"""The checkpoint key that marks shared weights and folded norms. Its value: the number of bits by weight name."""


class WeightSharing(Callback):
    """Shares the weights of each layer when training is over, and trains the shared values for ``epochs`` more epochs.

    The epochs of ``trainer.max_epochs`` and the rounds of a pruning callback run first. To share the weights of a run
    that is already trained, call ``fit --ckpt_path`` with its ``last.ckpt`` and the same ``trainer.max_epochs``. A
    thinned ``best.ckpt`` is at epoch 0, so it needs ``trainer.max_epochs`` 0.

    Sharing starts from the best epoch so far, which stays as ``checkpoints/level_<n>.ckpt``. Then Adam trains the
    shared values: the gradient of a value is the sum of the gradients of its weights, and the learning rate falls to 0
    along half a cosine. Zeros stay zeros. Norms, biases and layers that are not shared are trained by the run's own
    optimizer, which is created anew. Its schedule starts again at the point after the warm-up.

    At the end the best epoch with shared weights is finished and written to ``best.ckpt`` and ``level_<n+1>.ckpt``.
    There a shared layer has at most ``2 ** bits`` float16 values and 0, norms are a scale and a shift, and norms and
    biases have ``vector_bits`` bits. Do not train a finished net further: batch norm would use the statistics of the
    batches again.

    The checkpoints of the run hold the codebooks, their optimizer and the assignments of the weights, so
    ``fit --resume`` gives the same bits as a run without a stop. An :class:`~project.callbacks.EMA` starts its averages
    again when sharing begins, and averages the shared values.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.WeightSharing
              init_args:
                sharer:
                  class_path: project.compression.Sharer
                  init_args: {bits: 4}
                epochs: 2

    Args:
        sharer: layers to share and the number of values of each; None means 4 bits for all layers.
        epochs: number of epochs with shared weights, 1 or more; they follow all other epochs.
        lr: first learning rate of Adam for the shared values, relative to the root mean square of a layer's shared
            values; above 0.
        finetune_lr: factor on the run's learning rate for all parameters that are not shared; above 0.
        vector_bits: number of bits of norm scales, norm shifts and biases in the finished checkpoint; 2 to 16.
        num_images: number of training images for new batch norm statistics at the end; 0 or more. With 0, the
            statistics of training stay.
        report: whether to add a row to ``report.csv`` and ``report.md``.
        latency: whether to measure the latency for this row.

    Raises:
        ValueError: if a number is outside its range.
    """

    stages = ("shared weights", "smaller net")
    company = COMPANY

    def __init__(
        self,
        sharer: Sharer | None = None,
        epochs: int = 2,
        lr: float = 0.01,
        finetune_lr: float = 1.0,
        vector_bits: int = 8,
        num_images: int = 2048,
        report: bool = True,
        latency: bool = True,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}, but shared weights are saved after an epoch: choose 1 or more.")
        for name, rate in (("lr", lr), ("finetune_lr", finetune_lr)):
            if not rate > 0:
                raise ValueError(f"{name} is {rate}, but it scales a learning rate: choose a number above 0.")
        if not 2 <= vector_bits <= 16:
            raise ValueError(f"vector_bits is {vector_bits}: choose 2 to 16, such as 8.")
        if num_images < 0:
            raise ValueError(f"num_images is {num_images}, but it is a number of images: choose 0 or more.")
        self.sharer = sharer or Sharer()
        self.epochs, self.lr, self.finetune_lr = epochs, lr, finetune_lr
        self.vector_bits, self.num_images = vector_bits, num_images
        self.report, self.latency = report, latency
        self.codebook: Codebook | None = None
        self.bits: dict[str, int] = {}
        """The number of bits of each shared weight, by the weight's name. Empty before sharing begins."""
        self._begin = 0  # the first epoch with shared weights
        self._num_steps = 0  # steps of the codebook's optimizer so far
        self._total_steps = 0.0  # and all of them
        self._optimizer: torch.optim.Adam | None = None
        self._optimizer_state: dict[str, Any] = {}

    # -- the course of a run -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_sharing(trainer, pl_module, self, self.epochs)
        assert isinstance(pl_module, Classifier) and trainer.max_epochs is not None
        self.sharer.layers(pl_module.net)
        if (self.sharer.budget_bytes or self.num_images) and not isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            raise ValueError(
                "budget_bytes and num_images need training images, but the run has no ImageDataModule: give one, or "
                "set budget_bytes: null and num_images: 0."
            )
        self.codebook, self.bits, self._optimizer, self._optimizer_state = None, {}, None, {}
        self._num_steps, self._total_steps = 0, 0.0
        self._begin = trainer.max_epochs
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("fast_dev_run shares no weights: it trains one batch, and only the layer names were checked")
            return
        trainer.fit_loop.max_epochs = self._begin + self.epochs
        # The schedule must not count the added epochs. A pruning callback has already set the phase of its round.
        pl_module.phase = pl_module.phase or Phase(max(self._begin, 1))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Choose the schedule of the shared epochs if the checkpoint was written during one of them.

        Lightning creates the run's optimizer and schedule after this hook.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.training and state and state["bits"] and isinstance(pl_module, Classifier):
            pl_module.phase = self._phase(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if self.codebook is not None:
            self._optimize(self.codebook.to_(pl_module.device))
        elif self._begin == 0 and trainer.ckpt_path is None:
            raise ValueError(
                "trainer.max_epochs is 0, so that random weights would be shared: give trained weights as --ckpt_path."
            )
        elif trainer.current_epoch > self._begin and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"trainer.max_epochs is {self._begin}, but the checkpoint has trained for {trainer.current_epoch} "
                f"epochs: set trainer.max_epochs to {trainer.current_epoch} to share its weights at once."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        fast = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.codebook is None and trainer.current_epoch == self._begin and not fast:
            self._share(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the step of the shared values.

        Afterwards the gradients of the shared weights are None, so that the run's optimizer skips these weights.
        """
        if self.codebook is None or self._optimizer is None:
            return
        assert isinstance(pl_module, Classifier)
        # trainer.max_epochs includes the shared epochs by now: steps per epoch, times the shared epochs.
        total = self.epochs * trainer.estimated_stepping_batches / max(trainer.max_epochs or 1, 1)
        if total != (before := self._total_steps or total):  # the run is resumed with another batch size
            self._num_steps = round(self._num_steps * total / before)
        self._total_steps = total
        factor = (1 + math.cos(math.pi * min(self._num_steps / total, 1))) / 2  # above 0 in the last step too
        self._num_steps += 1
        gradients = self.codebook.gradients(pl_module.net)
        for group, name in zip(self._optimizer.param_groups, gradients, strict=True):
            group["lr"] = self.lr * group["scale"] * factor  # scale: root mean square of the layer's values
            group["params"][0].grad = gradients[name]
        self._optimizer.step()
        self.codebook.write_(pl_module.net)
        for name in gradients:
            pl_module.net.get_parameter(name).grad = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        run = run_of(trainer)
        if trainer.current_epoch < (trainer.max_epochs or 0):
            log.warning("the run stopped before the shared weights were trained: continue it with fit --resume")
            return
        if run is None or self.codebook is None or not (run.best_checkpoint.is_file() or run.last_checkpoint.is_file()):
            return
        self._finish(trainer, pl_module, run)
        number = self._level(trainer)
        keep_best_as(run, number + 1)
        if self.report and isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            if not run.report.is_file():
                report_steps(trainer, pl_module, [Step("dense", run.level_checkpoint(number))], measured=[])
            add_step_row(
                trainer, pl_module, Step("weight_sharing", run.level_checkpoint(number + 1)), latency=self.latency
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            trainer.fit_loop.max_epochs = min(trainer.max_epochs or 0, self._begin)  # pruning has reset it already
            pl_module.phase = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the trainer and the model back as they were, since Lightning calls no ``teardown`` after an error."""
        if getattr(pl_module, "phase", None) is not None:  # ``setup`` has come to its end
            self.teardown(trainer, pl_module, "fit")

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.codebook is None:
            return {"bits": {}}
        optimizer = self._optimizer.state_dict() if self._optimizer else self._optimizer_state
        steps = {"num_steps": self._num_steps, "total_steps": self._total_steps}
        state = {"bits": self.bits, **steps, "optimizer": optimizer}
        return state | self.codebook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict["bits"]:
            return
        self.bits, self._num_steps = dict(state_dict["bits"]), state_dict["num_steps"]
        self._total_steps = state_dict.get("total_steps", 0.0)
        self.codebook = Codebook.from_state_dict(state_dict)
        self._optimizer_state = state_dict["optimizer"]

    # -- sharing -------------------------------------------------------------------------------------------------

    def _share(self, trainer: Trainer, module: Classifier) -> None:
        """Begin the shared epochs: cluster the weights of the best net and start both optimizers."""
        self._keep_level(trainer, module)
        self.bits = self._choose_bits(trainer, module)
        self.codebook = Codebook.of(module.net, self.bits, self.sharer.start, _seed(trainer))
        self.codebook.write_(module.net)
        self._optimize(self.codebook)
        module.phase = self._phase(trainer, module)
        trainer.strategy.setup_optimizers(trainer)
        if (pruning := self._pruning(trainer)) is not None:
            pruning.hold(trainer, module)  # the masks must follow the new optimizer
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA):
                callback.restart()
        forget_best(trainer)
        centers, index = self.codebook.centers, self.codebook.index
        size = sum(estimated_bytes(centers[name], index[name]) for name in centers)
        log.info("the weights of %d layers are shared: about %.1f kB entropy coded", len(centers), size / 1000)

    def _keep_level(self, trainer: Trainer, module: Classifier) -> None:
        """Keep the best checkpoint so far as ``level_<n>.ckpt`` and load its weights, which are shared next."""
        pruning, run = self._pruning(trainer), getattr(trainer, "run", None)
        if pruning is not None:
            pruning.keep_level(trainer, module)
        if run is None:
            return
        number = self._level(trainer)
        if trainer.is_global_zero:
            keep_best_as(run, number)
        trainer.strategy.barrier()
        kept = run.level_checkpoint(number)
        if kept.is_file():
            checkpoint = torch.load(kept, map_location="cpu", weights_only=True)
            module.load_state_dict(checkpoint["state_dict"])
        elif trainer.checkpoint_callbacks:  # the fit began with the checkpoint of another run (--ckpt_path)
            part = kept.with_name(f".{kept.name}")
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                part.replace(kept)
            trainer.strategy.barrier()

    def _choose_bits(self, trainer: Trainer, module: Classifier) -> dict[str, int]:
        """The number of bits by weight name: the sharer's own, or those within its budget."""
        bits = self.sharer.layers(module.net)
        if self.sharer.budget_bytes is None:
            return bits
        images = _images(trainer, self.sharer.num_images).to(module.device)
        options = measure_options(deepcopy(module.net), list(bits), images, self.sharer.start, _seed(trainer))
        # All processes must use the same bits, so the first process chooses.
        chosen: dict[str, int] = trainer.strategy.broadcast(choose_bits(options, self.sharer.budget_bytes))
        log.info("bits under the budget: %s", ", ".join(f"{name} {number}" for name, number in chosen.items()))
        return chosen

    def _optimize(self, codebook: Codebook) -> None:
        """Create Adam for the centers, with a learning rate for each layer that is relative to its values."""
        scales = [float(centers[1:].square().mean().sqrt()) for centers in codebook.centers.values()]
        groups = [
            {"params": [centers], "scale": scale}
            for centers, scale in zip(codebook.centers.values(), scales, strict=True)
        ]
        self._optimizer = torch.optim.Adam(groups, lr=self.lr, betas=(0.9, 0.99))
        if self._optimizer_state:
            self._optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = {}

    def _finish(self, trainer: Trainer, module: Classifier, run: Run) -> None:
        """Write ``best.ckpt`` with shared weights and folded norms.

        This happens once, because folding removes the batch norm statistics.
        """
        source = run.best_or_last
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        if _FINISHED in checkpoint:
            return
        assert self.codebook is not None
        small, codebook = with_weights(module, checkpoint), self.codebook.to_("cpu")
        codebook.gather_(small.net)  # with EMA, the best weights are averages, not the last centers
        codebook.write_(small.net)
        if self.num_images:
            reestimate_statistics_(small.net, _images(trainer, self.num_images))
        fold_norms_(small.net, self.vector_bits)  # needs the final statistics; rounding needs the folded vectors
        round_vectors_(small.net, self.vector_bits)
        finished = fresh_checkpoint(small, checkpoint) | {_FINISHED: self.bits}
        save_checkpoint(finished, run.best_checkpoint)

    def _phase(self, trainer: Trainer, module: Classifier) -> Phase:
        """The run's schedule over the shared epochs, without its warm-up.

        The phase is longer by the warm-up and starts at its end, because the warm-up may be longer than ``epochs``.
        """
        warmup = math.ceil(module.schedule.warmup_epochs)
        return Phase(warmup + self.epochs, warmup, self.finetune_lr)

    def _level(self, trainer: Trainer) -> int:
        """The number n of the checkpoint ``level_<n>.ckpt`` whose weights are shared."""
        pruning = self._pruning(trainer)
        return 0 if pruning is None else pruning.round

    @staticmethod
    def _pruning(trainer: Trainer) -> Any | None:
        """The pruning callback of the run, or None."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((each for each in callbacks if "pruning" in stages_of(each)), None)


def _images(trainer: Trainer, count: int) -> Tensor:
    """Training images ``[N, C, H, W]``, normalised and not augmented, at most ``count``."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, ImageDataModule)
    images: Tensor = data.sample(count)[0]
    return images


def _seed(trainer: Trainer) -> int:
    """The seed of the run, or 0 without an ImageDataModule."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.run_seed if isinstance(data, ImageDataModule) else 0
