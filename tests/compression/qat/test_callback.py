"""Which runs quantization-aware training refuses before the first step. Its fits are tested with the int8 files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.pruning_run import fit
from lightning.pytorch import LightningModule

from project.callbacks import QuantizationAwareTraining


def test_another_model_is_refused() -> None:
    trainer: Any = SimpleNamespace(max_epochs=3, fast_dev_run=False)
    with pytest.raises(ValueError, match="the model is a LightningModule"):
        QuantizationAwareTraining(1).setup(trainer, LightningModule(), "fit")


def test_rounded_epochs_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begin_epoch is 2, but the last checkpoint is written after epoch 2"):
        fit(tmp_path, QuantizationAwareTraining(2), epochs=3, check_val_every_n_epoch=2)
