"""Learning-rate schedules whose lengths are given in epochs and resolved to steps when training starts.

Warm-up: Goyal et al. 2017 (arXiv:1706.02677, sec. 2.2, gradual). Cosine: Loshchilov & Hutter 2017
(arXiv:1608.03983, eq. 5). One cycle: Smith & Topin 2018 (arXiv:1708.07120, sec. 3).
Each builds one of torch's own schedulers.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau


class Schedule:
    """A constant rate after an optional warm-up; subclasses override :meth:`decay`.

    Args:
        warmup_epochs: length of the linear warm-up, in epochs (may be a fraction).
        warmup_start: the warm-up's first factor, in [0, 1]; ``None`` takes ``1 / k`` for a rate multiplied by k
            through the linear scaling rule (as Goyal et al. do: from the unscaled rate), else 0.

    Raises:
        ValueError: for a negative length, or a start outside [0, 1].
    """

    def __init__(self, warmup_epochs: float = 0.0, warmup_start: float | None = None) -> None:
        _check("warmup_epochs", warmup_epochs, warmup_epochs >= 0, "choose 0 (off) or more")
        if warmup_start is not None:
            _check("warmup_start", warmup_start, 0 <= warmup_start <= 1, "choose a factor from 0 to 1")
        self.warmup_epochs = warmup_epochs
        self.warmup_start = warmup_start

    def decay(self, progress: float, epoch: float) -> float:
        """The factor on the rate after the warm-up, at ``progress`` in [0, 1] of what follows it."""
        return 1.0

    def build(
        self,
        optimizer: Optimizer,
        total_steps: int,
        steps_per_epoch: float,
        lr_scale: float = 1.0,
        first_step: int = 0,
    ) -> dict[str, Any]:
        """What Lightning's ``configure_optimizers`` returns under ``lr_scheduler``.

        Args:
            optimizer: whose rates are scheduled.
            total_steps: optimizer steps of the whole run.
            steps_per_epoch: optimizer steps of one epoch.
            lr_scale: k of the linear scaling rule, already contained in the optimizer's rate.
            first_step: the step of the schedule to begin with (a run that is rewound to it).
        """
        factor = self._factor(total_steps, steps_per_epoch, lr_scale)
        return {"scheduler": LambdaLR(optimizer, lambda step: factor(first_step + step)), "interval": "step"}

    def _factor(self, total_steps: int, steps_per_epoch: float, lr_scale: float) -> Callable[[int], float]:
        warmup = min(self.warmup_epochs * steps_per_epoch, total_steps)
        start = self.warmup_start
        if start is None:
            start = 1 / lr_scale if lr_scale > 1 else 0.0

        def factor(step: int) -> float:
            # Step 0 already learns: the ramp counts the steps taken when this one is done, and so does the decay.
            if step + 1 < warmup:
                return start + (1 - start) * (step + 1) / warmup
            progress = min((step + 1 - warmup) / max(total_steps - warmup, 1), 1.0)
            return self.decay(progress, (step + 1) / steps_per_epoch)

        return factor


class Cosine(Schedule):
    """Half a cosine from the rate to ``final`` times it.

    Args:
        warmup_epochs, warmup_start: see :class:`Schedule`.
        final: last factor, in [0, 1].
    """

    def __init__(self, warmup_epochs: float = 0.0, warmup_start: float | None = None, final: float = 0.0) -> None:
        super().__init__(warmup_epochs, warmup_start)
        _check("final", final, 0 <= final <= 1, "choose a factor from 0 to 1")
        self.final = final

    def decay(self, progress: float, epoch: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Linear(Cosine):
    """A straight line from the rate to ``final`` times it; with a warm-up, a triangle."""

    def decay(self, progress: float, epoch: float) -> float:
        return 1 - (1 - self.final) * progress


class Steps(Schedule):
    """The rate times ``gamma`` at each milestone.

    Args:
        milestones: epochs, counted from the start of training, ascending.
        gamma: factor, in (0, 1].
        warmup_epochs, warmup_start: see :class:`Schedule`.
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
        return self.gamma ** sum(epoch > milestone for milestone in self.milestones)


class OneCycle(Schedule):
    """Torch's one-cycle policy: up to the optimizer's rate, down to nearly nothing, momentum the other way.

    Args:
        warmup_fraction: share of the run spent going up, in (0, 1).
        start_factor: the first rate over the highest, in (0, 1].
        final_factor: the last rate over the highest, in [0, 1).
        cycle_momentum: move momentum between 0.85 and 0.95 against the rate (needs SGD's momentum or Adam's betas).
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
        total_steps: int,
        steps_per_epoch: float,
        lr_scale: float = 1.0,
        first_step: int = 0,
    ) -> dict[str, Any]:
        _check_begins_at_0(self, first_step)
        scheduler = OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps,
            pct_start=self.warmup_fraction,
            div_factor=1 / self.start_factor,
            final_div_factor=self.start_factor / self.final_factor,
            cycle_momentum=self.cycle_momentum,
        )
        return {"scheduler": scheduler, "interval": "step"}


class Plateau(Schedule):
    """The rate times ``factor`` when ``monitor`` has not got better for ``patience`` validations.

    Args:
        monitor: a logged metric; names that end in ``loss`` are to fall, all others to rise.
        factor: in (0, 1).
        patience: epochs to wait, 0 or more.
    """

    def __init__(self, monitor: str = "val/loss", factor: float = 0.1, patience: int = 5) -> None:
        super().__init__()
        _check("factor", factor, 0 < factor < 1, "choose a factor between 0 and 1")
        _check("patience", patience, patience >= 0, "choose 0 or more epochs")
        self.monitor, self.factor, self.patience = monitor, factor, patience

    def build(
        self,
        optimizer: Optimizer,
        total_steps: int,
        steps_per_epoch: float,
        lr_scale: float = 1.0,
        first_step: int = 0,
    ) -> dict[str, Any]:
        _check_begins_at_0(self, first_step)
        mode: Literal["min", "max"] = "min" if self.monitor.endswith("loss") else "max"
        scheduler = ReduceLROnPlateau(optimizer, mode, factor=self.factor, patience=self.patience)
        return {"scheduler": scheduler, "interval": "epoch", "monitor": self.monitor}


def _check_begins_at_0(schedule: Schedule, first_step: int) -> None:
    if first_step:
        raise ValueError(
            f"{type(schedule).__name__} can not begin at step {first_step} of its course: rewind to 0, or choose "
            "Linear, Cosine or Steps."
        )


def _check(name: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ValueError(f"schedule's {name} is {value}: {remedy}.")
