"""A callback for the tests: stops a run as a time limit would."""

from lightning.pytorch import Callback, LightningModule, Trainer


class StopAfter(Callback):
    """Stops after ``epochs`` epochs of this process."""

    def __init__(self, epochs: int = 1) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True
