"""What a fit takes from the checkpoint that it continues, and what it does not take."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

log = logging.getLogger(__name__)

_COUNTED = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
"""What torch's ReduceLROnPlateau counts in a run."""


class ContinueFromCheckpoint(Callback):
    """Compares optimizer and schedule of a fit with those of the checkpoint that it continues.

    The optimizer goes on with the settings of the checkpoint; a line names the settings that differ. A new run, which
    begins with the checkpoint of another run, does not take over the best score and the count of ``EarlyStopping`` and
    ``Plateau``, nor the time that counts for ``max_time``. Their patience is that of the configuration.

    Every run has this callback.

    Example::

        >>> from project.callbacks import ContinueFromCheckpoint, default_callbacks
        >>> any(isinstance(callback, ContinueFromCheckpoint) for callback in default_callbacks(progress=False))
        True
    """

    _found: Mapping[str, Any] = {}  # the checkpoint, until the optimizer is made

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._found = checkpoint
        states = checkpoint.get("callbacks", {})
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, EarlyStopping | Timer) or not states.get(callback.state_key):
                continue
            if is_of_another_run(trainer):
                states[callback.state_key] = {}
            elif isinstance(callback, EarlyStopping):
                states[callback.state_key] = _with_patience(states[callback.state_key], callback.patience)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the settings, before those of the checkpoint replace the new ones.

        Raises:
            ValueError: if the checkpoint belongs to an optimizer or a schedule of another kind.
        """
        found, self._found = self._found, {}
        for config, saved in zip(trainer.lr_scheduler_configs, found.get("lr_schedulers", []), strict=False):
            made = config.scheduler.state_dict()
            _check_kind("schedule", config.scheduler, made, saved)
            if config.reduce_on_plateau:  # its settings are those of the configuration
                new = is_of_another_run(trainer) or made["mode"] != saved["mode"]
                saved.update({key: made[key] for key in made if new or key not in _COUNTED})
        for optimizer, saved in zip(trainer.optimizers, found.get("optimizer_states", []), strict=False):
            group = saved["param_groups"][0]
            _check_kind("optimizer", optimizer, optimizer.defaults, group)
            if changed := _changes(optimizer.param_groups[0], group):
                log.warning(
                    "The optimizer goes on as in the checkpoint: %s. To begin with the new values, start a new run "
                    "with --weights FILE in the place of the checkpoint.",
                    "; ".join(changed),
                )


def is_of_another_run(trainer: Trainer) -> bool:
    """Whether the fit is a new run that begins with a checkpoint of another run."""
    origin = getattr(trainer, "origin", None)
    return origin is not None and origin != getattr(trainer, "run", None)


def nothing_to_train(trainer: Trainer) -> str | None:
    """Why a fit that continues a checkpoint has nothing left to train, in words; ``None`` if it has."""
    loop, steps, max_steps = trainer.fit_loop, trainer.global_step, trainer.max_steps
    epochs, max_epochs = loop.epoch_progress.current.processed, loop.max_epochs or 0  # type: ignore[attr-defined]
    early = any(each.stopping_reason.value for each in trainer.callbacks if isinstance(each, EarlyStopping))  # type: ignore[attr-defined]
    reasons = {
        f"{epochs} of {max_epochs} epochs are done, raise trainer.max_epochs to go on": 0 <= max_epochs <= epochs,
        f"{steps} of {max_steps} steps are done, raise trainer.max_steps to go on": 0 <= max_steps <= steps,
        "the time is over, raise trainer.max_time to go on": loop._can_stop_early and trainer.should_stop,
        "EarlyStopping has ended the run, raise its patience or leave it out": loop._can_stop_early and early,
    }
    return next((reason for reason, holds in reasons.items() if holds and steps), None)


def _with_patience(state: dict[str, Any], patience: int) -> dict[str, Any]:
    """The state of an EarlyStopping with another patience. If that is longer, the run has not been stopped."""
    goes_on = state["patience"] <= state["wait_count"] < patience
    return {**state, "patience": patience} | ({"stopped_epoch": 0, "stopping_reason": 0} if goes_on else {})


def _check_kind(name: str, made: object, values: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise an error if the checkpoint lacks a value of this optimizer or schedule.

    A value that is off by default (``None`` or a bool) may be missing, because an older torch does not know it.
    """
    needed = [key for key, value in values.items() if key[0] != "_" and not isinstance(value, bool | None)]
    if missing := next((key for key in needed if key not in saved), None):
        raise ValueError(
            f"the {name} is {type(made).__name__}, but the checkpoint belongs to another one, without {missing}: keep "
            f"the {name} of that run, or start a new run with its weights alone (--weights FILE)."
        )


def _changes(group: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The settings of a group of parameters that differ from those of the checkpoint, in words."""
    cycled = {"params", "lr", *(("momentum", "betas") if "max_momentum" in group else ())}
    keys = [key for key in group if key in saved and key not in cycled and str(group[key]) != str(saved[key])]
    return [f"{key.replace('initial_lr', 'lr')} is {saved[key]}, not {group[key]}" for key in keys]
