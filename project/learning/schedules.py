"""Learning-rate schedules. Their lengths are given in epochs and become numbers of steps when training starts.

Warm-up: Goyal et al. 2017 (arXiv:1706.02677, sec. 2.2, gradual). Cosine: Loshchilov & Hutter 2017
(arXiv:1608.03983, eq. 5). One cycle: Smith & Topin 2018 (arXiv:1708.07120, sec. 3).
Each class builds one of torch's own schedulers.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau


class Schedule:
    """A constant rate after an optional linear warm-up; the base class of all schedules, which override :meth:`decay`.

    Example::

        model:
          schedule:
            class_path: project.learning.Schedule
            init_args: {warmup_epochs: 1.5}

    Args:
        warmup_epochs: length of the linear warm-up in epochs, 0 or more; fractions are allowed.
        warmup_start: factor on the rate at the start of the warm-up, in [0, 1]. ``None`` starts at the unscaled rate
            (as Goyal et al. do), with the factor ``1 / k``, if the linear scaling rule multiplied the rate by k > 1. It
            starts at 0 otherwise.

    Raises:
        ValueError: if the length is negative, or if the start is outside [0, 1].
    """

    def __init__(self, warmup_epochs: float = 0.0, warmup_start: float | None = None) -> None:
        _check("warmup_epochs", warmup_epochs, warmup_epochs >= 0, "choose 0 (off) or more")
        if warmup_start is not None:
            _check("warmup_start", warmup_start, 0 <= warmup_start <= 1, "choose a factor from 0 to 1")
        self.warmup_epochs = warmup_epochs
        self.warmup_start = warmup_start

    def decay(self, progress: float, epoch: float) -> float:
        """The factor on the rate, after the warm-up.

        Args:
            progress: share of the steps after the warm-up that are done before this one, in [0, 1); 0 at the highest
                rate.
            epoch: epochs since the start of training that are done after this step, above 0; a fraction within an
                epoch.
        """
        return 1.0

    def build(
        self,
        optimizer: Optimizer,
        total_steps: float,
        steps_per_epoch: float,
        lr_scale: float = 1.0,
        first_step: int = 0,
    ) -> dict[str, Any]:
        """Build the dictionary that Lightning's ``configure_optimizers`` returns under ``lr_scheduler``.

        Args:
            optimizer: optimizer of which the learning rates are scheduled.
            total_steps: number of optimizer steps of the whole run, at least 1; infinity for a run without an end.
            steps_per_epoch: number of optimizer steps of one epoch, above 0.
            lr_scale: factor k of the linear scaling rule, above 0, which the optimizer's rate already contains.
            first_step: step of the schedule to begin with, 0 or more. It is above 0 for a run that is rewound to a
                step.

        Raises:
            ValueError: if the run has no end, and the rate depends on how far the end is.
        """
        if self.decay(0.0, 1.0) != self.decay(0.5, 1.0):
            _check_has_end(self, total_steps)
        factor = self._factor(total_steps, steps_per_epoch, lr_scale)
        return {"scheduler": LambdaLR(optimizer, lambda step: factor(first_step + step)), "interval": "step"}

    def _factor(self, total_steps: float, steps_per_epoch: float, lr_scale: float) -> Callable[[int], float]:
        """The function that gives the factor on the rate at each step."""
        warmup = min(self.warmup_epochs * steps_per_epoch, total_steps)
        start = self.warmup_start
        if start is None:
            start = 1 / lr_scale if lr_scale > 1 else 0.0

        def factor(step: int) -> float:
            # The warm-up counts the steps that are done after this one, so that step 0 has a rate above 0. The decay
            # begins one step earlier and counts those before this one, so that the last step has a rate above 0. Steps
            # after the end, as in a round of pruning that repeats a part of the run, have the last step's rate.
            if step + 1 < warmup:
                return start + (1 - start) * (step + 1) / warmup
            begin = max(warmup, 1) - 1
            progress = (min(step, total_steps - 1) - begin) / max(total_steps - begin, 1)
            return self.decay(progress, (step + 1) / steps_per_epoch)

        return factor


class Cosine(Schedule):
    """The rate falls along half a cosine, to ``final`` times the rate.

    The last step is one step before this end, as in torch's ``CosineAnnealingLR``. So it trains even if
    ``final`` is 0.

    Example::

        model:
          schedule:
            class_path: project.learning.Cosine
            init_args: {warmup_epochs: 2, final: 0.01}

    Args:
        warmup_epochs: length of the linear warm-up in epochs, 0 or more; fractions are allowed.
        warmup_start: factor on the rate at the start of the warm-up, in [0, 1]. The default ``None`` is explained in
            :class:`Schedule`.
        final: factor on the rate at the end, after the last step, in [0, 1].
    """

    def __init__(self, warmup_epochs: float = 0.0, warmup_start: float | None = None, final: float = 0.0) -> None:
        super().__init__(warmup_epochs, warmup_start)
        _check("final", final, 0 <= final <= 1, "choose a factor from 0 to 1")
        self.final = final

    def decay(self, progress: float, epoch: float) -> float:
        """``final + (1 - final) (1 + cos(pi progress)) / 2``.

        Args:
            progress: share of the steps after the warm-up that are done, in [0, 1].
            epoch: epochs done since the start of training, any number; it is not used.
        """
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Linear(Cosine):
    """The rate falls along a straight line, to ``final`` times the rate. With a warm-up the schedule is a triangle.

    The last step is one step before this end. So it trains even if ``final`` is 0.

    Example::

        model:
          schedule:
            class_path: project.learning.Linear
            init_args: {warmup_epochs: 5}

    Args:
        warmup_epochs: length of the linear warm-up in epochs, 0 or more; fractions are allowed.
        warmup_start: factor on the rate at the start of the warm-up, in [0, 1]. The default ``None`` is explained in
            :class:`Schedule`.
        final: factor on the rate at the end, after the last step, in [0, 1].
    """

    def decay(self, progress: float, epoch: float) -> float:
        """``1 - (1 - final) progress``.

        Args:
            progress: share of the steps after the warm-up that are done, in [0, 1].
            epoch: epochs done since the start of training, any number; it is not used.
        """
        return 1 - (1 - self.final) * progress


class Steps(Schedule):
    """The rate is multiplied by ``gamma`` at each milestone.

    Example::

        model:
          schedule:
            class_path: project.learning.Steps
            init_args: {milestones: [15, 25], gamma: 0.1, warmup_epochs: 1}

    Args:
        milestones: numbers of epochs since the start of training, in ascending order.
        gamma: factor on the rate at each milestone, in (0, 1].
        warmup_epochs: length of the linear warm-up in epochs, 0 or more; fractions are allowed.
        warmup_start: factor on the rate at the start of the warm-up, in [0, 1]. The default ``None`` is explained in
            :class:`Schedule`.
    """

    def __init__(
        self,
        milestones: list[float],
        gamma: float = 0.1,
        warmup_epochs: float = 0.0,
        warmup_start: float | None = None,
    ) -> None:
        super().__init__(warmup_epochs, warmup_start)
        _check("milestones", milestones, list(milestones) == sorted(milestones), "list them in ascending order")
        _check("gamma", gamma, 0 < gamma <= 1, "choose a factor above 0, at most 1")
        self.milestones = list(milestones)
        self.gamma = gamma

    def decay(self, progress: float, epoch: float) -> float:
        """``gamma`` to the power of the number of milestones that have passed.

        Args:
            progress: share of the steps after the warm-up that are done, in [0, 1]; it is not used.
            epoch: epochs since the start of training that are done after this step, above 0; a fraction within an
                epoch.
        """
        return self.gamma ** sum(epoch > milestone for milestone in self.milestones)


class OneCycle(Schedule):
    """Torch's one-cycle policy: the rate rises to the optimizer's rate and then falls to nearly 0.

    If ``cycle_momentum`` is true, the momentum falls while the rate rises, and then rises.

    Example::

        model:
          schedule:
            class_path: project.learning.OneCycle
            init_args: {warmup_fraction: 0.2}

    Args:
        warmup_fraction: share of the run in which the rate rises, in (0, 1).
        start_factor: ratio of the first rate to the highest, in (0, 1].
        final_factor: ratio of the last rate to the highest, in (0, 1).
        cycle_momentum: whether the momentum moves between 0.85 and 0.95, against the rate. It needs an optimizer with
            SGD's momentum or Adam's betas.
    """

    def __init__(
        self,
        warmup_fraction: float = 0.3,
        start_factor: float = 0.04,
        final_factor: float = 1e-4,
        cycle_momentum: bool = False,
    ) -> None:
        super().__init__()
        _check("warmup_fraction", warmup_fraction, 0 < warmup_fraction < 1, "choose a share between 0 and 1")
        _check("start_factor", start_factor, 0 < start_factor <= 1, "choose a factor above 0, at most 1")
        _check("final_factor", final_factor, 0 < final_factor < 1, "choose a factor between 0 and 1")
        self.warmup_fraction, self.start_factor, self.final_factor = warmup_fraction, start_factor, final_factor
        self.cycle_momentum = cycle_momentum

    def build(
        self,
        optimizer: Optimizer,
        total_steps: float,
        steps_per_epoch: float,
        lr_scale: float = 1.0,
        first_step: int = 0,
    ) -> dict[str, Any]:
        """Build the dictionary that Lightning's ``configure_optimizers`` returns under ``lr_scheduler``.

        Args:
            optimizer: optimizer of which the learning rates are scheduled.
            total_steps: number of optimizer steps of the whole run, at least 1.
            steps_per_epoch: number of optimizer steps of one epoch, any number; it is not used.
            lr_scale: factor of the linear scaling rule, any number; it is not used.
            first_step: step of the schedule to begin with; only 0 is possible.

        Raises:
            ValueError: if the run has no end, or if ``first_step`` is above 0.
        """
        _check_begins_at_0(self, first_step)
        _check_has_end(self, total_steps)
        scheduler = OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=max(int(total_steps), 2),
            pct_start=max(self.warmup_fraction, (1 + 1e-9) / max(total_steps, 2)),  # at exactly 1 torch divides by 0
            div_factor=1 / self.start_factor,
            final_div_factor=self.start_factor / self.final_factor,
            cycle_momentum=self.cycle_momentum,
        )
        return {"scheduler": scheduler, "interval": "step"}


class Plateau(Schedule):
    """The rate is multiplied by ``factor`` if ``monitor`` has not improved for more than ``patience`` epochs.

    For a metric of the validation, epochs without a validation (``trainer.check_val_every_n_epoch``) do not count.

    Example::

        model:
          schedule:
            class_path: project.learning.Plateau
            init_args: {monitor: val/accuracy, factor: 0.5, patience: 3}

    Args:
        monitor: name of a logged metric. A metric whose name ends in ``loss`` improves when it falls, any other when it
            rises.
        factor: factor on the rate after each wait, in (0, 1).
        patience: number of epochs without improvement that are accepted, 0 or more.
    """

    def __init__(self, monitor: str = "val/loss", factor: float = 0.1, patience: int = 5) -> None:
        super().__init__()
        _check("factor", factor, 0 < factor < 1, "choose a factor between 0 and 1")
        _check("patience", patience, patience >= 0, "choose 0 or more epochs")
        self.monitor, self.factor, self.patience = monitor, factor, patience

    def build(
        self,
        optimizer: Optimizer,
        total_steps: float,
        steps_per_epoch: float,
        lr_scale: float = 1.0,
        first_step: int = 0,
    ) -> dict[str, Any]:
        """Build the dictionary that Lightning's ``configure_optimizers`` returns under ``lr_scheduler``.

        Args:
            optimizer: optimizer of which the learning rates are scheduled.
            total_steps: number of optimizer steps of the whole run, any number; it is not used.
            steps_per_epoch: number of optimizer steps of one epoch, any number; it is not used.
            lr_scale: factor of the linear scaling rule, any number; it is not used.
            first_step: step of the schedule to begin with; only 0 is possible.
        """
        _check_begins_at_0(self, first_step)
        mode: Literal["min", "max"] = "min" if self.monitor.endswith("loss") else "max"
        scheduler = ReduceLROnPlateau(optimizer, mode, factor=self.factor, patience=self.patience)
        return {"scheduler": scheduler, "interval": "epoch", "monitor": self.monitor}


def _check_begins_at_0(schedule: Schedule, first_step: int) -> None:
    if first_step:
        raise ValueError(
            f"the schedule {type(schedule).__name__} cannot begin at step {first_step}: rewind to step 0, or choose "
            "Linear, Cosine or Steps."
        )


def _check_has_end(schedule: Schedule, total_steps: float) -> None:
    if total_steps == math.inf:
        raise ValueError(
            f"trainer.max_epochs is -1, but the schedule {type(schedule).__name__} needs the length of the run: set "
            "trainer.max_epochs or trainer.max_steps, or choose the schedule Schedule, Steps or Plateau."
        )


def _check(name: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ValueError(f"the schedule's {name} is {value}: {remedy}.")
