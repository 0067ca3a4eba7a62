"""At the end of a fit: the best checkpoint with Winograd's algorithm in it, its row, and set-ups that are refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pruning_run import DigitsOnce, TinyNet, fit, pruning, weights_of
from lightning.pytorch import Callback
from torch import nn

from project import models
from project.callbacks import LowRank, PostTrainingQuantization, WinogradConvolutions
from project.compression import OneShot, WinogradConv2d
from project.compression.report_rows import read_report
from project.compression.winograd import callback as module
from project.deployment.model_file import ModelFile
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.learning.checkpoints import load_net
from project.models import Classifier
from project.models.kernels.build import library


def winograd(algorithm: Any = "f4", **options: Any) -> WinogradConvolutions:
    return WinogradConvolutions(algorithm, **{"rounds": 2, "latency": False, **options})


def tiles_of(run: Run) -> dict[str, int]:
    net = load_net(Classifier(TinyNet(), 10, (1, 8, 8)), run.best_checkpoint)
    return {name: layer.tile for name, layer in net.named_modules() if isinstance(layer, WinogradConv2d)}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("latency", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_best_net_is_written_again_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture, latency: bool) -> None:
    with caplog.at_level(logging.INFO, "project.compression.winograd.callback"):
        outcome = fit(tmp_path, winograd(latency=latency))
    run = outcome.run
    assert tiles_of(run) == {"conv2.conv": 4}
    best, dense = weights_of(run.best_checkpoint), weights_of(run.level_checkpoint(0))
    assert best.keys() == dense.keys() and all(torch.equal(best[key], dense[key]) for key in dense)
    assert torch.load(run.level_checkpoint(0), weights_only=True)["surgeries"] == []
    before, after = read_report(run.report)
    assert (before.step, after.step) == ("dense", "winograd")
    assert abs((before.test_accuracy or 0) - (after.test_accuracy or 1)) < 0.01
    assert (before.macs or 0) - (after.macs or 0) == 16 * (9 - 36 / 16) * 8 * 16  # of 4x4 pixels, one tile
    assert (before.num_parameters, before.num_nonzero) == (after.num_parameters, after.num_nonzero)
    if latency:
        assert after.engine == "eager" and after.speedup_batch64
    assert "conv2.conv" in caplog.text and "x of 4.00x, error" in caplog.text and "1 of 1 layers" in caplog.text


@pytest.mark.usefixtures("kernels")
def test_a_finished_run_that_is_resumed_is_measured_again(tmp_path: Path) -> None:
    run = fit(tmp_path, winograd()).run
    dense = run.level_checkpoint(0).read_bytes()
    fit(tmp_path, winograd(), resume=run)
    assert [row.step for row in read_report(run.report)] == ["dense", "winograd"] and tiles_of(run) == {"conv2.conv": 4}
    assert run.level_checkpoint(0).read_bytes() == dense
    fit(tmp_path, winograd("f2"), epochs=3, resume=run)
    assert tiles_of(run) == {"conv2.conv": 2}


@pytest.mark.usefixtures("kernels")
def test_where_nothing_wins_the_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.WinogradChooser, "_times", lambda self, runs: [[1.0]] * len(runs))
    run = fit(tmp_path, winograd("auto")).run
    assert not tiles_of(run)
    assert run.best_checkpoint.read_bytes() == run.level_checkpoint(0).read_bytes()
    before, after = read_report(run.report)
    assert after.step == "winograd" and after.macs == before.macs
    fit(tmp_path, winograd("f4"), resume=run)
    assert tiles_of(run)
    fit(tmp_path, winograd("auto"), resume=run)  # as on another machine, where it does not win
    assert not tiles_of(run)


@pytest.mark.usefixtures("kernels")
def test_after_pruning_the_thinned_net_is_timed(tmp_path: Path) -> None:
    first = pruning(schedule=OneShot(0.5), epochs_per_round=1, report=True, latency=False)
    run = fit(tmp_path, first, winograd()).run
    steps = [row.step for row in read_report(run.report)]
    assert steps[0] == "dense" and steps[-1] == "winograd" and len(set(steps)) == len(steps) > 2
    assert tiles_of(run) == {"conv2.conv": 4}


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_an_int8_file_of_it_is_that_of_the_plain_net(tmp_path: Path) -> None:
    int8 = PostTrainingQuantization(latency=False, max_drop=1.0)
    plain, fast = fit(tmp_path / "plain", int8).run, fit(tmp_path / "fast", winograd(), int8).run
    images = torch.randn(16, 1, 8, 8)
    for format in ("onnx", "onnx-int8"):
        one, other = (ModelFile(run.model_file(format)).logits(images) for run in (plain, fast))
        assert torch.equal(one, other)
    assert [row.step for row in read_report(fast.report)] == ["dense", "winograd", "int8"]


def refused(callbacks: list[Callback], net: nn.Module | None = None) -> str:
    trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu", observe=False, enable_progress_bar=False)
    trainer.datamodule = DigitsOnce()
    (callback,) = (each for each in callbacks if isinstance(each, WinogradConvolutions))
    with pytest.raises(ValueError) as caught:
        callback.setup(trainer, Classifier(net or TinyNet(), 10, (1, 8, 8)), "fit")
    return str(caught.value)


def test_set_ups_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "LeNet300100 has no convolution of 3x3" in refused([winograd("auto")], models.LeNet300100(10, (1, 8, 8)))
    assert "include has 'stem', which finds no" in refused([winograd("auto", include=["stem"])])
    for later in (LowRank(1), pruning()):
        assert f"stands before {type(later).__name__}" in refused([winograd("auto"), later])
    with pytest.raises(ValueError, match="algorithm is 'fft'"):
        winograd("fft")
    monkeypatch.setenv("PROJECT_KERNELS", "0")
    library.cache_clear()
    assert "algorithm is 'f2', but there is no kernel for it" in refused([winograd("f2")])
    library.cache_clear()
