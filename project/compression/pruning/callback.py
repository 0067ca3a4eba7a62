"""Iterative magnitude pruning: one run trains the net, prunes it and trains it further.

- Han et al. 2015 (arXiv:1506.02626): prune, then fine-tune at a tenth of the learning rate.
- Frankle & Carbin 2019 (arXiv:1803.03635): rewind the weights to their initial values.
- Frankle et al. 2020 (arXiv:1912.05671): rewind the weights to their values at training step k.
- Renda et al. 2020 (arXiv:2003.02389): rewind the learning rate and keep the weights.
- Zhu & Gupta 2017 (arXiv:1710.01878): prune gradually within one training.
"""

import logging
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor

from project.callbacks.checkpoint import BestAndLast, forget_best, keep_best_as
from project.callbacks.ema import EMA
from project.callbacks.places import run_of, show_figure, tensorboard
from project.compression.company import Company, check_company
from project.compression.pruning.checkpoint import keep_fresh
from project.compression.pruning.checks import check_end, check_run, check_trainer
from project.compression.pruning.held_masks import HeldMasks, mask_gradients_
from project.compression.pruning.masks import Group, Masks, apply_masks_, removed_units, sparsity
from project.compression.pruning.pruner import Pruner, Whole, num_weights
from project.compression.pruning.round_lengths import After, RoundLengths, step_of, steps_per_epoch
from project.compression.pruning.schedules import Gradual, Iterative, QualityFactors, Rounds, share_to_take
from project.compression.report import Step, report_steps
from project.compression.thinning.carry import thin_optimizers_, thin_state
from project.compression.thinning.units import plan_thinning
from project.data import ImageDataModule
from project.deployment.report_plots import plot_levels
from project.learning.classifier import Classifier
from project.models.layers import reinit_

log = logging.getLogger(__name__)


class IterativeMagnitudePruning(Callback):
    """Trains the dense net for ``trainer.max_epochs``, then prunes and trains it again, round after round.

    Each round begins with a new optimizer and a new learning-rate schedule. Masks keep pruned weights at zero after
    each optimizer step, also in EMA's averages. Pruned units are removed from the net at once, so that the next epochs
    cost less. EMA's averages and the weights to rewind to lose the same units. The run's checkpoints hold the masks,
    the removed units and the number of the round, so that a run continued by ``fit --resume`` ends in the same bits as
    a run that was not stopped.

    Level 0 is the trained dense net, and level r is the net after round r. The best epoch of each level is kept as
    ``checkpoints/level_<r>.ckpt``. ``best.ckpt`` is the best epoch of the last level. If units were removed, a fit from
    it (``--ckpt_path``) trains the smaller net with a new optimizer from epoch 0. If ``max_time`` or another callback
    ends the run early, there is no report until the run is resumed and reaches its last epoch.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.IterativeMagnitudePruning
              init_args:
                schedule:
                  class_path: project.compression.Iterative
                  init_args: {fraction: 0.2, rounds: 5}
                epochs_per_round: 10

    Args:
        schedule: the share that is pruned in each round; null is ``Iterative()``, 10 rounds of 20 % each. With
            :class:`~project.compression.pruning.schedules.Gradual` the net is pruned within ``trainer.max_epochs``, and
            there are no rounds.
        pruner: the choice of the weights or units that are pruned; null is ``Pruner()``, single weights by magnitude
            over all layers.
        after: how the net is trained after each pruning. ``finetune``: the weights stay, and the learning rate is
            multiplied by ``finetune_lr``. ``rewind_lr``: the weights stay, and the learning-rate schedule starts again.
            ``rewind``: weights and schedule go back to ``rewind_to``. ``reinit``: the weights get new random values,
            which is a control experiment.
        epochs_per_round: number of epochs of a round, 1 or more; null is ``trainer.max_epochs``, less the epochs that
            ``rewind_to`` skips if it is given in epochs.
        rewind_to: moment of the dense training that ``rewind`` goes back to: ``0``, a step such as ``500it``, or an
            epoch such as ``2ep``. Anything but ``0`` needs ``after: rewind``.
        finetune_lr: factor on the learning rate in the rounds of ``finetune``, above 0.
        report: whether ``report.csv`` and ``report.md`` are written, with the accuracy of each level on validation and
            test images and its size.
        latency: whether the report has the latency of its first step (the dense net, if there are rounds) and of its
            last two steps.

    Raises:
        ValueError: if a number is outside its range, or if two arguments contradict each other.
    """

    stages = ("pruning", "smaller net")
    company = Company(
        never={
            "early stopping": "it could end the run before its last round: leave it out (the best epoch of each level "
            "is kept anyway), or shorten the dense training with a smaller max_epochs",
            "averaged weights": "Lightning's average does not follow the masks: use project.callbacks.EMA",
        }
    )

    def __init__(
        self,
        schedule: Rounds | Gradual | None = None,
        pruner: Pruner | None = None,
        after: After = "finetune",
        epochs_per_round: int | None = None,
        rewind_to: str = "0",
        finetune_lr: float = 0.1,
        report: bool = True,
        latency: bool = True,
    ) -> None:
        self.schedule = schedule or Iterative()
        self.pruner = pruner or Pruner()
        self.after = after
        self.report, self.latency = report, latency
        self._lengths = RoundLengths(after, epochs_per_round, rewind_to, finetune_lr)
        if isinstance(self.schedule, Gradual) and (after, epochs_per_round, finetune_lr) != ("finetune", None, 0.1):
            raise ValueError(
                f"after is {after!r}, epochs_per_round is {epochs_per_round} and finetune_lr is {finetune_lr:g}, but "
                "the schedule Gradual has no rounds that could use them: leave all three out, or choose the schedule "
                "Iterative or Sparsities."
            )
        if (self.pruner.scope == "deviation") != isinstance(self.schedule, QualityFactors):
            raise ValueError(
                f"scope is {self.pruner.scope} and the schedule is {type(self.schedule).__name__}, but scope: "
                "deviation and the schedule QualityFactors need each other: set both or neither."
            )
        self.round = 0
        self.masks: Masks = {}
        self.rewound: dict[str, Tensor] = {}
        """The net's state at ``rewind_to``."""
        self.rewound_at = 0.0
        """Number of epochs after which the net had that state."""
        self.levels: list[dict[str, Any]] = []
        """For each finished level: ``sparsity`` and best ``score``; with the budget ``macs`` also ``macs_gone``, the
        share of the net's multiply-accumulates that thinning removes.
        """
        self.whole: Whole | None = None
        """The size of the net before the first pruning."""
        self._groups: list[Group] = []
        self._amounts: list[float] = []
        self._held = HeldMasks()

    # -- during a run --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer, pl_module)
        check_company(trainer.callbacks, self)  # type: ignore[attr-defined]
        assert isinstance(pl_module, Classifier)
        fast = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        self.round, self.masks, self.rewound, self.rewound_at, self.levels = 0, {}, {}, 0.0, []
        self.whole = None
        self._amounts = [] if isinstance(self.schedule, Gradual) or fast else self.schedule.amounts()
        self._groups = self.pruner.groups(pl_module.net, pl_module.image_shape)
        check_end(self.schedule, self.pruner, self._groups, pl_module)
        assert trainer.max_epochs is not None
        self._lengths.dense_epochs = trainer.max_epochs
        if fast:
            log.info("fast_dev_run trains one batch: the layers to prune were found, but nothing is pruned")
            return
        check_run(trainer, self.schedule, self.pruner, self._lengths.dense_epochs, self._lengths.round_epochs)
        trainer.fit_loop.max_epochs = self._lengths.dense_epochs + len(self._amounts) * self._lengths.round_epochs
        pl_module.phase = self._lengths.phase(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        # A checkpoint may have changed the net's structure (fewer units, low-rank layers) after `setup` ran.
        if pl_module.surgeries:
            self._groups = self.pruner.groups(pl_module.net, pl_module.image_shape)
        if self.whole is None:
            self.whole = self.pruner.size_of(pl_module.net, self._groups, pl_module.image_shape)
        if self.pruner.structure == "units" and self.masks:  # a checkpoint of an older version, which masked units
            masks, self.masks = self.masks, {}
            self._remove(trainer, pl_module, removed_units(self._groups, masks))
        if (
            self._amounts
            and self.after == "rewind"
            and self._lengths.rewind_step(trainer) >= self._lengths.dense_epochs * steps_per_epoch(trainer)
        ):
            raise ValueError(
                f"rewind_to is {self._lengths.rewind_to}, but the dense training has only "
                f"{self._lengths.dense_epochs} epochs: choose an earlier step or epoch."
            )
        self.hold(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        epochs = trainer.current_epoch - self._lengths.dense_epochs
        # Round r (counted from 0) begins r * round_epochs after the dense training. A run that is resumed within the
        # round has `self.round == r + 1` already, so that it does not prune twice.
        if self.round < len(self._amounts) and epochs == self.round * self._lengths.round_epochs:
            self._begin_round(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        pl_module.log("pruning/sparsity", self._sparsity(pl_module), sync_dist=trainer.world_size > 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, Classifier)
        if self.after == "rewind" and not self.rewound and self._lengths.reaches_rewind_point(trainer):
            self.rewound = {name: value.clone() for name, value in pl_module.net.state_dict().items()}
            self.rewound_at = step_of(trainer, batch_idx) / steps_per_epoch(trainer)
        if isinstance(self.schedule, Gradual) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            target = self.schedule.sparsity_at(step_of(trainer, batch_idx), steps_per_epoch(trainer))
            if target is not None:  # the schedule counts from the dense net, the pruner from what is left
                self._prune(trainer, pl_module, share_to_take(self._share_gone(pl_module), target))
                forget_best(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, Classifier)
        mask_gradients_(pl_module.net, self.masks)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self._held.release()
        if trainer.current_epoch < (trainer.max_epochs or 0):
            self._tell_that_it_stopped(trainer)
            return
        # If the level is stored already, weight sharing has continued from it, and best.ckpt belongs to weight sharing.
        if len(self.levels) == self.round:
            self.keep_level(trainer, pl_module)
        run = run_of(trainer)
        if run is None or not run.level_checkpoint(self.round).is_file():
            return
        steps = [Step("dense", run.level_checkpoint(0))] if self._amounts else []
        for number in range(bool(self._amounts), self.round + 1):
            level = self.levels[number]
            name = f"pruned {100 * level['sparsity']:.2f} %"
            if "macs_gone" in level:
                name = f"pruned {100 * level['macs_gone']:.2f} % of MACs"
            steps.append(Step(name, run.level_checkpoint(number)))
        if self.pruner.structure == "units":
            keep_fresh(pl_module, run.level_checkpoint(self.round), run.best_checkpoint)
        if self.report and isinstance(trainer.datamodule, ImageDataModule):  # type: ignore[attr-defined]
            report_steps(trainer, pl_module, steps, measured=[step.name for step in steps[-2:]] if self.latency else [])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Classifier):
            trainer.fit_loop.max_epochs = self._lengths.dense_epochs
            pl_module.phase = None
            self._held.release()
            if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # the net goes back to its own process
                pl_module.register_state_dict_post_hook(
                    lambda module, state, *_: state.update(surgeries=module.surgeries)
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the trainer and the model back as they were, since Lightning calls no ``teardown`` after an error."""
        self._held.release()
        if getattr(pl_module, "phase", None) is not None:  # ``setup`` has come to its end
            self.teardown(trainer, pl_module, "fit")

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "masks": {name: mask != 0 for name, mask in self.masks.items()},
            "rewound": self.rewound,
            "rewound_at": self.rewound_at,
            "levels": self.levels,
            "whole": None if self.whole is None else asdict(self.whole),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.round, self.masks = state_dict["round"], state_dict["masks"]
        self.rewound, self.levels = state_dict["rewound"], list(state_dict["levels"])
        self.rewound_at = state_dict.get("rewound_at", self.rewound_at)
        self.whole = Whole(**state_dict["whole"]) if state_dict.get("whole") else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the phase of the checkpoint's round, before the optimizer of a resumed run is made."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.training and state is not None and isinstance(pl_module, Classifier):
            if (at := state.get("rewound_at")) is None:  # a checkpoint of an older version
                at = self._lengths.rewind_step(trainer) / steps_per_epoch(trainer)
            self.rewound_at = at
            pl_module.phase = self._lengths.phase(state["round"], at)

    # -- a round -------------------------------------------------------------------------------------------------

    def _begin_round(self, trainer: Trainer, module: Classifier) -> None:
        """End the present level, prune, set the weights as ``after`` says, and make the round's optimizer."""
        self.keep_level(trainer, module)
        assert isinstance(self.schedule, Rounds)
        amount = self._amounts[self.round]
        if self.pruner.overshoots:  # the round before may have pruned too much: this one then prunes less
            amount = self.schedule.amount(self.round, self._share_gone(module))
        self._prune(trainer, module, amount)
        self.round += 1
        if self.after == "rewind":
            state = module.net.state_dict()  # with the versions of its modules
            state.update(self.rewound)
            module.net.load_state_dict(state)
        elif self.after == "reinit":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed(trainer) * 1_000_003 + self.round)  # each round of each seed is different
                reinit_(module.net)
        if self.after in ("rewind", "reinit"):
            for ema in _emas(trainer):
                ema.restart()
        apply_masks_(module.net, self.masks)
        module.phase = self._lengths.phase(self.round, self.rewound_at)
        trainer.strategy.setup_optimizers(trainer)
        self.hold(trainer, module)
        forget_best(trainer)
        share, counted = 100 * self._share_gone(module), self.pruner.counted
        log.info("round %d of %d: %.2f %% of the %s pruned", self.round, len(self._amounts), share, counted)

    def _share_gone(self, module: Classifier) -> float:
        """The share of the schedule's quantity that is gone."""
        if self.pruner.structure == "weights":
            return self.pruner.share_gone(module.net, self._groups, self.masks)
        assert self.whole is not None
        return 1 - self.pruner.size_of(module.net, self._groups, module.image_shape).counted / self.whole.counted

    def _sparsity(self, module: Classifier) -> float:
        """The share of the pruned layers' weights that are zero. For units: of the net's weights that are gone."""
        if self.pruner.structure == "weights":
            return sparsity(self.masks, module.net)
        return 0.0 if self.whole is None else 1 - num_weights(module.net) / self.whole.weights

    def _prune(self, trainer: Trainer, module: Classifier, amount: float) -> None:
        """Prune ``amount`` of what is left. All processes prune what the first one has chosen."""
        images, labels = self._images(trainer, module) if self.pruner.needs_images else (None, None)
        masks = self.pruner.prune(
            module.net,
            self._groups,
            self.masks,
            amount,
            images=images,
            labels=labels,
            seed=hash((_seed(trainer), trainer.global_step)) % 2**32,  # a sum would repeat in runs of other seeds
            image_shape=module.image_shape,
            widths=self.whole.units if self.whole else None,
        )
        if self.pruner.structure == "units":
            removed = removed_units(self._groups, masks)
            self._remove(trainer, module, trainer.strategy.broadcast(removed))
        else:
            self.masks = trainer.strategy.broadcast(masks)
            self.hold(trainer, module)
            apply_masks_(module.net, self.masks)
            for ema in _emas(trainer):
                ema.mask_({f"net.{name}": mask for name, mask in self.masks.items()})
        self._draw_sparsity(trainer, module)

    def _remove(self, trainer: Trainer, module: Classifier, removed: dict[str, list[int]]) -> None:
        """Remove units from the net, the optimizer's state, EMA's averages and the weights to rewind to."""
        if not any(removed.values()):
            return
        plan = plan_thinning(module.net, removed, module.image_shape)
        before = dict(module.net.named_parameters())
        module.operate_(plan)
        thin_optimizers_(trainer.optimizers, before, module.net, plan)
        for ema in _emas(trainer):
            ema.change_(lambda averages: thin_state(averages, plan, "net."))
        self.rewound = thin_state(self.rewound, plan)
        if isinstance(trainer.strategy, DDPStrategy):  # DDP holds the parameters that it was made with
            trainer.strategy.model = module
            trainer.strategy.configure_ddp()
        self._groups = self.pruner.groups(module.net, module.image_shape)

    def hold(self, trainer: Trainer, module: Classifier) -> None:
        """Multiply the weights by the masks after each step of the present optimizer.

        Args:
            trainer: the trainer whose first optimizer is used.
            module: the classifier whose net is masked.
        """
        self.masks = self._held.hold(module.net, self.masks, trainer.optimizers[0])

    def keep_level(self, trainer: Trainer, module: Classifier) -> None:
        """Record the present level, and copy its best checkpoint to ``level_<round>.ckpt``.

        A file of that name is never overwritten: in a resumed run, ``best.ckpt`` may belong to the next level already.

        Args:
            trainer: the trainer of the run.
            module: the classifier whose net is pruned.
        """
        number = self.round
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast)), None)
        score = None if best is None or best.best_model_score is None else float(best.best_model_score)
        level: dict[str, Any] = {"sparsity": self._sparsity(module), "score": score}
        if self.pruner.budget == "macs":
            level["macs_gone"] = self._share_gone(module)
        self.levels = [*self.levels[:number], level]
        if (run := run_of(trainer)) is None or best is None:
            return
        keep_best_as(run, number)
        points = [(1 - level["sparsity"], level["score"]) for level in self.levels if level["score"] is not None]
        if len(points) > 1:
            show_figure(trainer, "pruning/score_by_weights_left", plot_levels(points, str(best.monitor)))

    def _draw_sparsity(self, trainer: Trainer, module: Classifier) -> None:
        """Write the sparsity of each layer to TensorBoard."""
        if (writer := tensorboard(trainer)) is not None:
            assert self.whole is not None
            for group in self._groups:
                name = group.parameters[0]
                if group.units is None or self.pruner.structure == "weights":
                    share = sparsity({name: self.masks[name]}, module.net)
                else:
                    share = 1 - group.units.num / self.whole.units.get(group.layer, group.units.num)
                writer.add_scalar(f"sparsity/{group.layer}", share, trainer.global_step)

    def _tell_that_it_stopped(self, trainer: Trainer) -> None:
        """Warn that the run ended before its last epoch, and say how to finish it."""
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        log.warning(
            "stopped after epoch %d of %s, before the pruning was over: there is no report yet. To "
            "finish, run fit --resume %s%s",
            trainer.current_epoch,
            trainer.max_epochs,
            "DIR" if (run := run_of(trainer)) is None else run.folder,
            " with a larger max_time (it includes the time used so far)" if timed else "",
        )

    def _images(self, trainer: Trainer, module: Classifier) -> tuple[Tensor, Tensor]:
        """Training images and their labels, for criteria that take gradients."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        images, labels = data.sample(self.pruner.num_images)
        return images.to(module.device), labels.to(module.device)


def _emas(trainer: Trainer) -> list[EMA]:
    """The run's callbacks that average weights."""
    return [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]


def _seed(trainer: Trainer) -> int:
    """The seed of the run; 0 without an ImageDataModule."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.run_seed if isinstance(data, ImageDataModule) else 0
