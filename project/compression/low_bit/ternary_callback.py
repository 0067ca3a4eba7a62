"""Binary and ternary weights: training with rounded weights, for a net with two or three values in each filter or
layer.

The mathematics and its sources are in :mod:`project.compression.low_bit.ternary`.
"""

import logging
import re
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from project.callbacks.checkpoint import forget_best, keep_best_as
from project.callbacks.ema import EMA
from project.callbacks.places import run_of
from project.compression.company import Company, check_company
from project.compression.low_bit.ternary import Freezing, LowBitWeights, Method
from project.compression.low_bit.xnor import BinaryInput
from project.compression.norm_folding import fold_norms_
from project.compression.plain_layers import check_weights
from project.compression.report import Step, add_step_row, report_steps
from project.compression.saved_epochs import check_saved
from project.data import ImageDataModule
from project.frame.paths import Run
from project.learning.checkpoints import fresh_checkpoint, save_checkpoint, with_weights
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)

_FINISHED = "ternary"
"""The checkpoint key that marks rounded weights. Its value: the method."""


class TernaryWeights(Callback):
    """Trains with binary or ternary weights in convolutions and linear layers.

    By default the first and the last layer keep float weights. The optimizer trains float weights, and validation
    measures the rounded ones. At the end ``best.ckpt`` and ``level_1.ckpt`` hold the rounded weights, with norms as
    scale and shift: a net to test, export and pack. With ``begin_epoch`` above 0 the net is first trained in float, and
    the best of these epochs stays as ``level_0.ckpt``.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.TernaryWeights
              init_args: {method: twn, begin_epoch: 10}

    Args:
        method: rounding method: ``bwn`` (binary), ``twn`` (ternary) or ``ttq`` (ternary with two learned values per
            layer).
        begin_epoch: first epoch with rounded weights, counted from 0; 0 or more.
        freeze: shares of each layer's weights that are rounded for good, rising, above 0, and ending with 1, such as
            [0.5, 0.75, 0.875, 1]. The steps are spread evenly over the epochs from ``begin_epoch`` on. Each step rounds
            the largest weights that are left, and the others stay float. None rounds all weights in the forward pass
            from ``begin_epoch`` on. ``ttq`` needs None.
        include: regular expressions; a layer is rounded if one is found in its name (``re.search``). None means all
            layers.
        exclude: regular expressions; a layer is not rounded if one is found in its name. None means the first and the
            last layer.
        lr: learning rate of Adam for the values of ``ttq``, above 0; it follows the schedule of the run's learning
            rate.
        report: whether to add a row to ``report.csv`` and ``report.md``.

    Raises:
        ValueError: if an argument is outside its range, or if two arguments contradict each other.
    """

    stages = ("low bit", "smaller net")
    company = Company(
        never={
            "early stopping": "it would end the run before or during the rounded epochs: remove one of the two",
            "pruning": "ternary weights have zeros of their own, and binary weights cannot be 0: remove one of the two",
            "integer training": "both round the weights, and eight bits hold two or three values without it: remove "
            "one of the two",
            "shared weights": "the two or three values of a layer are shared already: remove one of the two",
            "low bit": "both round the weights: remove one of the two",
            "low rank": "thin layers would replace the rounded layers: remove one of the two",
        },
        before={"integer file": "it would quantize the float weights: put it after the rounding"},
    )

    def __init__(
        self,
        method: Method = "twn",
        begin_epoch: int = 0,
        freeze: list[float] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        lr: float = 1e-3,
        report: bool = True,
    ) -> None:
        LowBitWeights(method, ["any"])
        if begin_epoch < 0:
            raise ValueError(f"begin_epoch is {begin_epoch}, but epochs count from 0: choose 0 or more.")
        if lr <= 0:
            raise ValueError(f"lr is {lr}, but a learning rate is positive: choose a number above 0.")
        if freeze is not None:
            if not freeze or sorted(set(freeze)) != list(freeze) or freeze[0] <= 0 or freeze[-1] != 1:
                raise ValueError(f"freeze is {freeze}: give shares above 0 that rise and end with 1, such as [0.5, 1].")
            Freezing(LowBitWeights(method, ["any"]))
        self.method: Method = method
        self.step: str = method
        self.begin_epoch, self.freeze = begin_epoch, freeze
        self.include, self.exclude = include, exclude
        self.lr, self.report = lr, report
        self.low_bit: LowBitWeights | None = None
        self.freezing: Freezing | None = None
        self._optimizer: torch.optim.Adam | None = None
        self._saved: dict[str, Any] = {}

    # -- the course of a run -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Classifier):
            raise ValueError(
                f"the model is a {type(pl_module).__name__}, but {type(self).__name__} needs a Classifier."
            )
        epochs = trainer.max_epochs or 0
        parts = len(self.freeze or [])
        given = f"begin_epoch is {self.begin_epoch}{f' and freeze has {parts} parts' if parts else ''}"
        if not trainer.fast_dev_run and 0 <= epochs < self.begin_epoch + max(parts, 1):  # type: ignore[attr-defined]
            raise ValueError(f"{given}, but training ends after {epochs} epochs: begin earlier, or train longer.")
        if self.method == "ttq" and trainer.precision == "16-mixed":
            raise ValueError(
                "precision is 16-mixed, but only the run's own optimizer skips steps with overflowing gradients, and "
                "the values of ttq have another one: choose bf16-mixed or 32-true."
            )
        check_saved(trainer, max(self._begins(trainer), default=self.begin_epoch), given)
        check_company(trainer.callbacks, self)  # type: ignore[attr-defined]
        self.low_bit = LowBitWeights(self.method, self._layers(pl_module.net))
        self.freezing = None if self.freeze is None else Freezing(self.low_bit)
        self._optimizer, self._saved = None, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow a restored checkpoint: it may have changed the names of the layers, and its tensors are on the CPU."""
        assert isinstance(pl_module, Classifier) and self.low_bit is not None
        self.low_bit.layers = self._layers(pl_module.net)
        values = {name: each.detach().to(pl_module.device) for name, each in self.low_bit.values.items()}
        self.low_bit.values = {name: each.requires_grad_() for name, each in values.items()}
        if self.freezing is not None:
            self.freezing.to_(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        epoch = trainer.current_epoch
        if epoch == self.begin_epoch and epoch > 0:
            if (run := run_of(trainer)) is not None:
                keep_best_as(run, 0)
            forget_best(trainer)
        if self.freezing is not None and (portion := self._portion(trainer)) is not None:
            self.freezing.freeze_(pl_module.net, portion)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EMA):  # its averages have values of before the rounding
                    callback.restart()
            forget_best(trainer)
            log.info("%g %% of the weights of each layer are now rounded for good", 100 * portion)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._attach(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._attach(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the plain forward methods, so that other callbacks can copy the net between epochs."""
        if self.low_bit is not None:
            self.low_bit.detach_()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.low_bit is not None:
            self.low_bit.detach_()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._optimizer is None:
            return
        # TTQ's values are no parameters of the net: they have this optimizer and are averaged over processes here.
        for group in self._optimizer.param_groups:
            rate = optimizer.param_groups[0]
            group["lr"] = self.lr * rate["lr"] / rate.get("initial_lr", rate["lr"])
            for values in group["params"]:
                values.grad = trainer.strategy.reduce(values.grad, reduce_op="mean")
        self._optimizer.step()
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            for values in group["params"]:
                values.data.clamp_(min=1e-8)  # the values stay positive

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.freezing is not None:
            assert isinstance(pl_module, Classifier)
            self.freezing.hold_(pl_module.net)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        run = run_of(trainer)
        if trainer.current_epoch < (trainer.max_epochs or 0):
            log.warning("the run stopped before the rounded weights were trained: continue it with fit --resume")
            return
        if run is None or not (run.best_checkpoint.is_file() or run.last_checkpoint.is_file()):
            return
        self._finish(pl_module, run)
        keep_best_as(run, 1)
        if self.report and isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            step = Step(self.step, run.level_checkpoint(1))
            if run.level_checkpoint(0).is_file():
                report_steps(trainer, pl_module, [Step("dense", run.level_checkpoint(0)), step], measured=[])
            elif run.report.is_file():
                add_step_row(trainer, pl_module, step, latency=False)
            else:
                report_steps(trainer, pl_module, [step], measured=[])

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        values = {} if self.low_bit is None else {name: each.detach() for name, each in self.low_bit.values.items()}
        state: dict[str, Any] = {"values": values}
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        if self.freezing is not None:
            state["freezing"] = self.freezing.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.low_bit is not None
        self.low_bit.values = {name: each.clone().requires_grad_() for name, each in state_dict["values"].items()}
        self._saved = state_dict.get("optimizer", {})
        if self.freezing is not None and "freezing" in state_dict:
            self.freezing.load_state_dict(state_dict["freezing"])

    # -- helpers -------------------------------------------------------------------------------------------------

    def _layers(self, net: nn.Module) -> list[str]:
        """The names of the layers to round, after ``include`` and ``exclude``."""
        layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        if not layers:
            raise ValueError(f"{type(net).__name__} has no convolution and no linear layer to round.")
        inside = {f"{name}.layer" for name, module in net.named_modules() if isinstance(module, BinaryInput)}
        # Users know a layer by the name that it had before XNORNet put a sign in front of it.
        known = {name: name.removesuffix(".layer") if name in inside else name for name in layers}
        ends = known[layers[0]], known[layers[-1]]
        exclude = [f"^{re.escape(name)}$" for name in ends] if self.exclude is None else self.exclude
        for argument, patterns in (("include", self.include or []), ("exclude", self.exclude or [])):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in known.values()):
                    names = ", ".join(known.values())
                    raise ValueError(f"{argument} has {pattern!r}, which matches no layer: the layers are {names}.")
        chosen = [
            name
            for name in layers
            if any(re.search(pattern, known[name]) for pattern in self.include or [".*"])
            and not any(re.search(pattern, known[name]) for pattern in exclude)
        ]
        check_weights(net, chosen, type(self).__name__)
        return chosen

    def _portion(self, trainer: Trainer) -> float | None:
        """The share of the weights to freeze at the start of this epoch; None if this epoch freezes nothing."""
        return dict(zip(self._begins(trainer), self.freeze or [], strict=True)).get(trainer.current_epoch)

    def _begins(self, trainer: Trainer) -> list[int]:
        """The epochs at whose start a share of the weights is frozen; none without ``freeze``."""
        parts, length = len(self.freeze or []), (trainer.max_epochs or 0) - self.begin_epoch
        return [self.begin_epoch + number * length // parts for number in range(parts)]

    def _attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Let the net compute with rounded weights, once ``begin_epoch`` is reached."""
        if self.low_bit is None or self.freezing is not None or trainer.current_epoch < self.begin_epoch:
            return
        assert isinstance(module, Classifier)
        self.low_bit.attach_(module.net)
        if self.low_bit.values and self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.low_bit.values.values(), lr=self.lr, betas=(0.9, 0.99))
            if self._saved:
                self._optimizer.load_state_dict(self._saved)

    def _finish(self, module: Classifier, run: Run) -> None:
        """Write ``best.ckpt`` with rounded weights and folded norms; nothing happens if that was done before.

        The learned values of ``ttq`` come from the same checkpoint as the weights, not from the last epoch.
        """
        source = run.best_or_last
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        if _FINISHED in checkpoint:
            return
        assert self.low_bit is not None
        small = with_weights(module, checkpoint)
        if self.freezing is None:
            values: dict[str, Tensor] = checkpoint["callbacks"][self.state_key]["values"]
            best = LowBitWeights(self.method, self.low_bit.layers)
            best.values = dict(values)
            weights = small.state_dict()
            best.write_(weights, prefix="net.")
            small.load_state_dict(weights)
        else:
            self.freezing.to_(torch.device("cpu"))
            self.freezing.hold_(small.net)  # averages of EMA may hold steps of before the weights were set again
        fold_norms_(small.net)  # saves 6 of 102 kB of a file of configs/fashion_mnist.yaml
        finished = fresh_checkpoint(small, checkpoint) | {_FINISHED: self.step}
        save_checkpoint(finished, run.best_checkpoint)
