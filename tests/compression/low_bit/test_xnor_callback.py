"""XNOR-Net in a fit: it learns, what is validated is what is left, and a resumed run ends in its bits."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pruning_run import (
    STEPS,
    DigitsOnce,
    TinyNet,
    Watch,
    assert_same_runs,
    differences,
    fit,
    pruning,
    sgd,
    weights_of,
)
from helpers.stop_after import StopAfter
from lightning.pytorch import Callback

from project.callbacks import (
    BestAndLast,
    LowRank,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    TernaryWeights,
    WeightSharing,
    XNORNet,
)
from project.compression.low_bit.xnor import BinaryInput, count_sign_macs
from project.compression.report import accuracy
from project.compression.report_rows import read_report
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.learning.checkpoints import load_net
from project.metrics.complexity import count_macs
from project.models import Classifier

LAYER = "conv2.conv.layer.weight"
"""What is left when the first and the last layer stay float."""


def test_it_learns_and_the_net_that_is_left_is_the_one_that_was_validated(tmp_path: Path) -> None:
    outcome = fit(tmp_path, XNORNet(), BestAndLast(monitor="val/accuracy"), epochs=8)
    weights = weights_of(outcome.run.best_checkpoint)
    rows = weights[LAYER].flatten(1)
    assert all(len(row.unique()) <= 2 and len(row.abs().unique()) == 1 for row in rows)
    assert len(weights["conv1.conv.weight"].unique()) > 30 and len(weights["fc.weight"].unique()) > 100
    content = torch.load(outcome.run.best_checkpoint, weights_only=True)
    assert content["surgeries"] == [{"type": "BinarizeInputs", "layers": ["conv2.conv"], "input_scale": False}]
    fresh = Classifier(TinyNet(), 10, (1, 8, 8))
    net = load_net(fresh, outcome.run.best_checkpoint)
    assert isinstance(net.get_submodule("conv2.conv"), BinaryInput)
    data = DigitsOnce(batch_size=64, seed=0)
    with outcome.run.metrics.open() as file:
        validated = [float(line["val/accuracy"]) for line in csv.DictReader(file) if line.get("val/accuracy")]
    assert accuracy(net, data, "val") == pytest.approx(max(validated), abs=1e-6)
    assert (accuracy(net, data, "test") or 0) > 0.35, "after 48 steps; of ten classes"
    (row,) = read_report(outcome.run.report)
    assert row.step == "xnor" and row.macs == count_macs(TinyNet(), (1, 8, 8))
    assert count_sign_macs(net, (1, 8, 8)) == 16 * 8 * 9 * 16, "the second convolution: 16 filters on 4 x 4 pixels"


def test_it_begins_where_it_should_with_an_optimizer_of_its_own(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", epochs=2).run
    watch = Watch()
    run = fit(tmp_path / "late", XNORNet(begin_epoch=2), watch, epochs=4).run
    assert not differences(weights_of(plain.best_checkpoint), weights_of(run.level_checkpoint(0)))
    before, after = watch.after[2 * STEPS - 1].weights, watch.before[2 * STEPS].weights
    assert torch.equal(before["conv2.conv.weight"], after[LAYER]), "it goes on from the float weights"
    assert not watch.before[2 * STEPS].state and watch.after[2 * STEPS].state
    assert watch.before[2 * STEPS].lr == watch.before[0].lr > watch.before[2 * STEPS - 1].lr
    assert [row.step for row in read_report(run.report)] == ["dense", "xnor"]


@pytest.mark.parametrize(
    ("begin", "stops"),
    [
        (1, (1, 3)),
        pytest.param(0, (2,), marks=pytest.mark.slow),
        pytest.param(2, (1, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_never_stopped(tmp_path: Path, begin: int, stops: tuple[int, ...]) -> None:
    whole = fit(tmp_path / "whole", XNORNet(begin, input_scale=True, report=False), epochs=4)
    run: Run | None = None
    for number, stop in enumerate((*stops, 99)):
        run = fit(
            tmp_path / "resumed",
            XNORNet(begin, input_scale=True, report=False),
            StopAfter(stop),
            epochs=4,
            seed=number,
            resume=run,
        ).run
    assert run is not None
    assert_same_runs(run, whole.run)
    assert run.metrics.read_text() == whole.run.metrics.read_text()


def go_on(run: Run, *callbacks: Callback, epochs: int) -> tuple[Run, Classifier]:
    """A new run from another one's best checkpoint."""
    model = Classifier(TinyNet(), 10, (1, 8, 8), optimizer=sgd)
    trainer = Trainer(
        experiment="next",
        logs_dir=str(run.folder),
        callbacks=list(callbacks),
        max_epochs=epochs,
        limit_train_batches=STEPS,
        num_sanity_val_steps=0,
        test_after_fit=False,
        accelerator="cpu",
        logger=False,
        observe=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=DigitsOnce(batch_size=64, seed=0), ckpt_path=str(run.best_checkpoint))
    assert trainer.run is not None
    return trainer.run, model


def test_it_starts_from_a_trained_net_and_from_its_own(tmp_path: Path) -> None:
    dense = fit(tmp_path, epochs=2).run
    first, _ = go_on(dense, XNORNet(report=False), epochs=4)
    kept = weights_of(dense.best_checkpoint)
    assert not torch.equal(weights_of(first.best_checkpoint)["fc.weight"], kept["fc.weight"])
    second, model = go_on(first, XNORNet(report=False), epochs=1)
    assert len(model.surgeries) == 1, "its inputs are signs already"
    rows = weights_of(second.best_checkpoint)[LAYER].flatten(1)
    assert all(len(row.abs().unique()) == 1 for row in rows)
    assert differences(weights_of(first.best_checkpoint), weights_of(second.best_checkpoint))


def test_ternary_weights_find_the_layers_of_a_binary_net(tmp_path: Path) -> None:
    ternary = TernaryWeights(report=False)
    run, _ = go_on(fit(tmp_path, XNORNet(report=False), epochs=1).run, ternary, epochs=1)
    assert ternary.low_bit is not None and ternary.low_bit.layers == ["conv2.conv.layer"]
    assert len(weights_of(run.best_checkpoint)[LAYER].unique()) == 3


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([pruning()], "hold XNORNet and IterativeMagnitudePruning.*zeros of their own"),
        ([QuantizationAwareTraining(0)], "both round"),
        ([LowRank(1)], "thin layers"),
        ([WeightSharing()], "shared already"),
        ([PostTrainingQuantization()], "stands before XNORNet"),
    ],
)
def test_company_that_makes_no_sense_is_refused(tmp_path: Path, others: list[Callback], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(tmp_path, *others, XNORNet())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"begin_epoch": -1}, "begin_epoch is -1"),
        ({"begin_epoch": 3}, "begin_epoch is 3, but training ends after 3 epochs"),
        ({"include": ["conv9"]}, "include has 'conv9'"),
        ({"exclude": ["."]}, "no layer is left"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(tmp_path, XNORNet(**options), epochs=3)
