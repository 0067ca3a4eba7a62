"""Training through binary and ternary weights: what is validated is what is left; a resumed run ends in its bits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.pruning_run import DigitsOnce, differences, fit, pruning, state_of, weights_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from project.callbacks import (
    BestAndLast,
    LowRank,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    TernaryWeights,
    WeightSharing,
)
from project.compression.report import accuracy
from project.compression.report_rows import read_report
from project.learning.checkpoints import load_net
from project.models import Classifier

LAYER = "conv2.conv.weight"
"""What is left when the first and the last layer stay float."""


class Validation(Callback):
    """The accuracy of each validation, and the float weights after each epoch."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.epochs: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(state_of(pl_module.net))  # type: ignore[arg-type]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accuracy.append(float(trainer.callback_metrics["val/accuracy"]))


@pytest.mark.parametrize("method", ["bwn", "twn", "ttq"])
def test_the_net_that_is_left_is_the_one_that_was_validated(tmp_path: Path, method: Any) -> None:
    watch = Validation()
    outcome = fit(tmp_path, TernaryWeights(method), watch, BestAndLast(monitor="val/accuracy"), epochs=3)
    weights = weights_of(outcome.run.best_checkpoint)
    values = weights[LAYER].flatten(1)
    assert all(len(row.unique()) <= 2 for row in values) if method == "bwn" else len(values.unique()) == 3
    assert len(weights["conv1.conv.weight"].unique()) > 30 and len(weights["fc.weight"].unique()) > 100
    net = load_net(outcome.model, outcome.run.best_checkpoint)
    reached = accuracy(net, DigitsOnce(batch_size=64, seed=0), "val")
    assert reached == pytest.approx(max(watch.accuracy))
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.running_mean.any() or len(norm.running_var.unique()) > 1 for norm in norms)
    assert len(watch.epochs[-1][LAYER].unique()) > 1000  # the optimizer's stay float
    assert not differences(weights, weights_of(outcome.run.level_checkpoint(1)))
    (row,) = read_report(outcome.run.report)
    assert row.step == method and row.val_accuracy == reached


def test_rounding_begins_where_it_should(tmp_path: Path) -> None:
    plain, watch = Validation(), Validation()
    fit(tmp_path / "plain", plain, epochs=3)
    run = fit(tmp_path / "late", TernaryWeights("twn", begin_epoch=2), watch, epochs=3).run
    assert not differences(plain.epochs[1], watch.epochs[1]) and differences(plain.epochs[2], watch.epochs[2])
    assert len(weights_of(run.level_checkpoint(0))[LAYER].unique()) > 1000
    assert [row.step for row in read_report(run.report)] == ["dense", "twn"]


def test_freezing_ends_with_three_values(tmp_path: Path) -> None:
    watch = Validation()
    run = fit(tmp_path, TernaryWeights("twn", freeze=[0.5, 1.0]), watch, epochs=4).run
    first, last = (epoch[LAYER] for epoch in (watch.epochs[1], watch.epochs[3]))
    assert len(last.unique()) == 3 and len(weights_of(run.best_checkpoint)[LAYER].unique()) == 3
    frozen = torch.isin(first, last.unique())
    assert 0.5 <= float(frozen.float().mean()) < 0.7 and torch.equal(first[frozen], last[frozen])


@pytest.mark.parametrize("options", [{"method": "ttq"}, {"freeze": [0.5, 1.0]}])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 14:
                raise KeyboardInterrupt

    whole = fit(tmp_path / "whole", TernaryWeights(begin_epoch=1, **options), epochs=4)
    with pytest.raises(SystemExit):
        fit(tmp_path / "half", TernaryWeights(begin_epoch=1, **options), Stop(), epochs=4)
    (folder,) = (tmp_path / "half" / "pruning").iterdir()
    (folder / "config.yaml").touch()
    from project.frame.paths import Run

    half = fit(tmp_path / "half", TernaryWeights(begin_epoch=1, **options), epochs=4, resume=Run(folder))
    for name in ("best_checkpoint", "last_checkpoint"):
        assert not differences(weights_of(getattr(whole.run, name)), weights_of(getattr(half.run, name)))
    assert weights_of(half.run.best_checkpoint).keys() == weights_of(fit(tmp_path, epochs=1).run.best_checkpoint).keys()


@pytest.mark.parametrize("options", [{"method": "ttq"}, {"freeze": [1.0]}])
def test_restored_tensors_move_to_the_device_of_the_net(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = TernaryWeights(report=False, **options)
    outcome = fit(tmp_path, callback, epochs=1)
    callback.load_state_dict(callback.state_dict())
    callback.on_train_start(outcome.trainer, outcome.model.to("meta"))
    assert callback.low_bit is not None
    values = list(callback.low_bit.values.values())
    frozen = [] if callback.freezing is None else [callback.freezing.frozen, callback.freezing.targets]
    tensors = values + [tensor for kind in frozen for tensor in kind.values()]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    assert all(tensor.is_leaf and tensor.requires_grad for tensor in values)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([pruning()], "zeros of their own"),
        ([QuantizationAwareTraining(0)], "both round"),
        ([LowRank(1)], "thin layers"),
        ([WeightSharing()], "shared already"),
        ([EarlyStopping("val/loss")], "during the rounded epochs"),
        ([PostTrainingQuantization()], "stands before TernaryWeights"),
    ],
)
def test_company_that_makes_no_sense_is_refused(tmp_path: Path, others: list[Callback], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(tmp_path, *others, TernaryWeights())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"begin_epoch": -1}, "begin_epoch is -1"),
        ({"begin_epoch": 7}, "begin_epoch is 7"),
        ({"freeze": [0.5]}, r"freeze is \[0.5\]"),
        ({"freeze": [0.7, 0.5, 1.0]}, "freeze is"),
        ({"freeze": [0.2, 0.5, 0.9, 1.0]}, "freeze has 4 parts"),
        ({"freeze": [1.0], "method": "ttq"}, "method is ttq"),
        ({"include": ["conv9"]}, "include has 'conv9'"),
        ({"exclude": ["."]}, "no layer is left"),
        ({"lr": 0}, "lr is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(tmp_path, TernaryWeights(**options), epochs=3)


def test_a_last_part_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="freeze has 3 parts, but the last checkpoint is written after epoch 2"):
        fit(tmp_path, TernaryWeights(freeze=[0.3, 0.6, 1.0]), epochs=3, check_val_every_n_epoch=2)


def test_gradients_that_may_overflow_are_refused() -> None:
    trainer: Any = SimpleNamespace(max_epochs=2, fast_dev_run=False, precision="16-mixed")
    with pytest.raises(ValueError, match="choose bf16-mixed"):
        TernaryWeights("ttq").setup(trainer, Classifier(torch.nn.Linear(2, 2)), "fit")
