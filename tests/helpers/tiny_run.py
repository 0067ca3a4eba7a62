"""A run in miniature: digits, a net of one convolution with batch norm and dropout, the real classifier."""

from types import SimpleNamespace

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from project.frame.paths import Run
from project.models import Classifier


class TinyDigits(LightningDataModule):
    """Normalised digits in a fixed order: 96 images to train on, 64 to validate, 100 to test."""

    def __init__(self, batch_size=16):
        super().__init__()
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.batch_size = batch_size
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        self.images = (self.images - 0.3) / 0.4
        self.labels = torch.tensor(digits.target)

    def loader(self, start, stop, batch_size):
        return DataLoader(TensorDataset(self.images[start:stop], self.labels[start:stop]), batch_size=batch_size)

    def train_dataloader(self):
        return self.loader(0, 96, self.batch_size)

    def val_dataloader(self):
        return self.loader(96, 160, 64)

    def test_dataloader(self):
        return self.loader(160, 260, 32)


class TrainerOfRun(Trainer):
    """Has the run's folder, as the project's own trainer does."""

    run: Run | None = None


def make_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(72, 10)
    )


def make_classifier(seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    names = tuple(f"digit {label}" for label in range(10))
    return Classifier(make_net(), 10, (1, 8, 8), names, (0.3,), (0.4,), **options)


def make_tiny(tmp_path):
    """Classifier, data and trainer makers; ``tiny.trainer(callbacks, …)`` writes to ``tiny.run``."""
    run = Run(tmp_path / "run")

    def make_trainer(callbacks=(), *, tensorboard=False, with_run=True, **options):
        logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False) if tensorboard else False
        options = {"max_epochs": 2, "enable_checkpointing": False, "log_every_n_steps": 1} | options
        options.setdefault("enable_progress_bar", False)
        trainer = TrainerOfRun(
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=logger,
            enable_model_summary=False,
            **options,
        )
        trainer.run = run if with_run else None
        return trainer

    return SimpleNamespace(classifier=make_classifier, data=TinyDigits, trainer=make_trainer, run=run)
