"""A callback that reports a trial's progress to its study, and stops the run if the study's pruner says so."""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    import optuna


class ReportTrial(Callback):
    """Keeps the best value of each validation metric, reports the monitored one, and stops a run that looks hopeless.

    A stopped run ends like a finished one, with its checkpoints and summary.

    Args:
        trial: trial of a study; ``None`` only keeps the best values.
        monitor: name of the metric to report. Metrics whose name ends in ``loss`` or ``error`` should fall, and all
            others should rise.
        prune: whether to ask the pruner after each epoch.
    """

    def __init__(self, trial: "optuna.Trial | None", monitor: str, prune: bool) -> None:
        self.trial, self.monitor, self.prune = trial, monitor, prune
        self.best: dict[str, float] = {}
        self.pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/") and not value.isnan():
                better = min if name.endswith(("loss", "error")) else max
                self.best[name] = better(value.item(), self.best.get(name, value.item()))
        if self.trial is None or not self.prune or self.monitor not in trainer.callback_metrics:
            return
        self.trial.report(trainer.callback_metrics[self.monitor].item(), step=trainer.current_epoch + 1)
        is_last = trainer.current_epoch + 1 == trainer.max_epochs  # to stop here would save nothing
        if not is_last and self.trial.should_prune():
            self.pruned = trainer.should_stop = True
