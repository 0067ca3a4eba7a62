"""Tells a study how a trial is going, and stops the run when the study's pruner says so."""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    import optuna


class ReportTrial(Callback):
    """Keeps the best value of each validation metric, reports the monitored one, and ends a hopeless run.

    That run ends like a finished one, with its checkpoints and summary.

    Args:
        trial: of a study; ``None`` keeps the best values alone.
        monitor: the metric to report; names that end in ``loss`` or ``error`` are to fall, all others to rise.
        prune: ask the pruner after each epoch.
    """

    def __init__(self, trial: "optuna.Trial | None", monitor: str, prune: bool) -> None:
        self.trial, self.monitor, self.prune = trial, monitor, prune
        self.best: dict[str, float] = {}
        self.pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                better = min if name.endswith(("loss", "error")) else max
                self.best[name] = better(value.item(), self.best.get(name, value.item()))
        if self.trial is None or not self.prune or self.monitor not in trainer.callback_metrics:
            return
        self.trial.report(trainer.callback_metrics[self.monitor].item(), step=trainer.current_epoch + 1)
        is_last = trainer.current_epoch + 1 == trainer.max_epochs  # then there is nothing to save
        if not is_last and self.trial.should_prune():
            self.pruned = trainer.should_stop = True
