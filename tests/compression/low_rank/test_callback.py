"""Factorised in the middle of a fit: structure, weights, optimizer, checkpoints, report; stopped and resumed."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pruning_run import (
    STEPS,
    DigitsOnce,
    FailBetween,
    TinyNet,
    Watch,
    differences,
    fit,
    pruning,
    same,
    sgd,
    state_of,
    weights_of,
)
from helpers.stop_after import StopAfter
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn

from project.callbacks import EMA, DistillFrom, LowRank, PostTrainingQuantization
from project.compression import Factorizer, Pruner, Quantizer, Sparsities
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.learning.checkpoints import load_net
from project.learning.schedules import Linear
from project.metrics.complexity import count_macs
from project.models import Classifier

ROOT = Path(__file__).resolve().parents[3]


def low_rank(begin_epoch: int = 2, finetune_lr: float = 0.5, report: bool = False, **options: Any) -> LowRank:
    factorizer = Factorizer(**{"macs_left": 0.6, "round_to": 2, "num_images": 64, **options})
    return LowRank(begin_epoch, factorizer, finetune_lr, report, latency=False)


def test_the_net_is_factorised_and_the_optimizer_new(tmp_path):
    watch = Watch()
    outcome = fit(tmp_path, low_rank(), watch, epochs=4)
    at = 2 * STEPS
    assert "conv2.conv.weight" in watch.after[at - 1].weights and "conv2.conv.0.weight" in watch.before[at].weights
    assert not watch.before[at].state and watch.after[at].state
    peak, dense = watch.before[0].lr, [watch.before[step].lr for step in range(at)]
    assert (dense == sorted(dense, reverse=True) and dense[-1] == 0) or dense[-1] < 0.1 * peak
    assert [watch.before[at + step].lr for step in range(at)] == pytest.approx([0.5 * lr for lr in dense])
    macs, whole = count_macs(outcome.model.net, (1, 8, 8)), count_macs(TinyNet(), (1, 8, 8))
    assert macs <= 0.6 * whole
    kept, best = (load_net(Classifier(TinyNet(), 10, (1, 8, 8)), outcome.run.level_checkpoint(n)) for n in (0, 1))
    assert (count_macs(kept, (1, 8, 8)), count_macs(best, (1, 8, 8))) == (whole, macs)
    # what the fit went on with is close to what it had: the function, not only the shapes
    before, after = TinyNet().eval(), load_net(outcome.model, outcome.run.level_checkpoint(1)).eval()
    before.load_state_dict(watch.after[at - 1].weights)
    after.load_state_dict(watch.before[at].weights)
    images = DigitsOnce(batch_size=64, seed=0)
    images.setup("fit")
    images = images.sample(200)[0]
    with torch.no_grad():
        change = (after(images) - before(images)).square().mean() / before(images).var()
    assert 0 < change < 0.3


CALLBACKS: dict[str, Callable[[], list[Any]]] = {
    "spatial, taught by the dense net": lambda: [low_rank(), DistillFrom()],
    "tucker, EMA": lambda: [low_rank(kinds=["tucker"], num_images=0), EMA(0.8)],
}


def assert_same_runs(resumed: Run, whole: Run) -> None:
    names = sorted(path.name for path in whole.checkpoints.glob("*.ckpt"))
    assert names == sorted(path.name for path in resumed.checkpoints.glob("*.ckpt"))
    for name in names:
        first, second = (torch.load(run.checkpoints / name, weights_only=True) for run in (resumed, whole))
        keys = ("state_dict", "ema_raw_weights", "optimizer_states", "lr_schedulers", "epoch", "surgeries")
        assert [key for key in keys if not same(first.get(key), second.get(key))] == [], name


@pytest.mark.parametrize(
    ("callbacks", "stops"),
    [
        ("spatial, taught by the dense net", (1, 3)),
        ("tucker, EMA", (2,)),
        pytest.param("spatial, taught by the dense net", (2,), marks=pytest.mark.slow),
        pytest.param("tucker, EMA", (1, 3), marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, callbacks, stops):
    make = CALLBACKS[callbacks]
    whole = fit(tmp_path / "whole", *make(), epochs=4)
    run = None
    for number, stop in enumerate((*stops, 99)):
        outcome = fit(tmp_path / "resumed", *make(), StopAfter(stop), epochs=4, seed=number, resume=run)
        run = outcome.run
    assert run is not None
    assert_same_runs(run, whole.run)
    assert not differences(state_of(outcome.model.net), state_of(whole.model.net))
    assert run.metrics.read_text() == whole.run.metrics.read_text()


def test_what_was_kept_before_stays_when_the_first_epoch_after_is_trained_again(tmp_path):
    whole = fit(tmp_path / "whole", low_rank(), epochs=4).run
    with pytest.raises(RuntimeError, match="no power"):
        fit(tmp_path / "resumed", low_rank(), FailBetween(2), epochs=4)
    run = Run(tmp_path / "resumed/pruning/version_0")
    run.config.touch()
    assert torch.load(run.best_checkpoint, weights_only=True)["surgeries"]
    assert not torch.load(run.last_checkpoint, weights_only=True)["surgeries"]
    assert_same_runs(fit(tmp_path / "resumed", low_rank(), FailBetween(99), epochs=4, seed=1, resume=run).run, whole)


def test_killed_after_the_end_of_training_the_trained_checkpoint_is_kept(tmp_path):
    class Fail(Callback):
        def on_fit_end(self, *_: object) -> None:
            raise RuntimeError("no power")

    whole = fit(tmp_path / "whole", low_rank(), epochs=3).run
    with pytest.raises(RuntimeError, match="no power"):
        fit(tmp_path / "resumed", low_rank(), Fail(), epochs=3)
    run = Run(tmp_path / "resumed/pruning/version_0")
    run.config.touch()
    assert_same_runs(fit(tmp_path / "resumed", low_rank(), epochs=3, resume=run).run, whole)


def test_the_report_has_both_rows(tmp_path):
    outcome = fit(tmp_path, low_rank(1, report=True), epochs=2)
    with outcome.run.report.open() as file:
        dense, thin = csv.DictReader(file)
    assert (dense["step"], thin["step"]) == ("dense", "low_rank")
    assert int(thin["macs"]) < 0.6 * int(dense["macs"]) and int(thin["num_parameters"]) < int(dense["num_parameters"])
    data = DigitsOnce(batch_size=64, seed=0)
    data.setup("test")
    images, labels, _ = data.test_data.__getitems__(list(range(len(data.test_data))))
    with torch.no_grad():
        answers = outcome.model.eval()(data.normalize(images.float() / 255)).argmax(1)
    assert float(thin["test_accuracy"]) == pytest.approx(float((answers == labels).float().mean()), abs=0.004)
    assert thin["file"] == "best.ckpt"


def go_on(run: Run, *callbacks: Any, epochs: int) -> tuple[Trainer, Classifier]:
    """A new run from another one's best checkpoint."""
    model = Classifier(TinyNet(), 10, (1, 8, 8), optimizer=sgd, schedule=Linear())
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
    return trainer, model


def test_factorised_then_pruned_then_factorised_again(tmp_path):
    """Each run starts from the one before; what the first removed stays away."""
    first = fit(tmp_path, low_rank(1), epochs=2)
    macs = [count_macs(TinyNet(), (1, 8, 8)), count_macs(first.model.net, (1, 8, 8))]
    units = Pruner("units", exclude=["conv1", "fc"], scope="layer")
    trainer, model = go_on(first.run, pruning(schedule=Sparsities([0.4]), pruner=units), epochs=1)
    assert trainer.run is not None
    macs.append(count_macs(load_net(model, trainer.run.best_checkpoint), (1, 8, 8)))
    trainer, model = go_on(trainer.run, low_rank(0, macs_left=0.8, round_to=1, exclude=["fc"]), epochs=1)
    assert trainer.run is not None
    net = load_net(model, trainer.run.best_checkpoint)
    macs.append(count_macs(net, (1, 8, 8)))
    assert macs == sorted(macs, reverse=True) and len(set(macs)) == len(macs)
    content = torch.load(trainer.run.best_checkpoint, weights_only=True)
    assert [surgery["type"] for surgery in content["surgeries"]] == ["Factorize", "Thin", "Factorize"]
    assert content["epoch"] == 0 and not differences(state_of(net), weights_of(trainer.run.best_checkpoint))
    before = torch.load(trainer.run.level_checkpoint(0), weights_only=True)
    assert len(before["surgeries"]) == 2, "the net that this run began with"


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        (lambda: [low_rank(3)], {"epochs": 3}, "begin_epoch is 3, but training ends after 3 epochs"),
        (lambda: [low_rank()], {"epochs": None, "max_steps": 9}, "set trainer.max_epochs, and leave max_steps out"),
        (
            lambda: [low_rank(), pruning()],
            {},
            "hold LowRank and IterativeMagnitudePruning.*run of its own.*--ckpt_path",
        ),
        (lambda: [low_rank(), EarlyStopping("val/loss")], {}, "hold LowRank and EarlyStopping"),
        (lambda: [low_rank(round_to=64)], {"epochs": 4}, "lower round_to"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, callbacks, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, *callbacks(), **{"epochs": 3, **options})


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="begin_epoch is -1"):
        LowRank(-1)
    with pytest.raises(ValueError, match="finetune_lr is 0"):
        LowRank(1, finetune_lr=0)


def test_a_fast_dev_run_changes_no_structure(tmp_path):
    torch.manual_seed(0)
    model = Classifier(TinyNet(), 10, (1, 8, 8), optimizer=sgd)
    Trainer(callbacks=[low_rank(0)], fast_dev_run=True, accelerator="cpu", logger=False, logs_dir=str(tmp_path)).fit(
        model, datamodule=DigitsOnce(batch_size=64, seed=0)
    )
    assert isinstance(model.net.conv2.conv, nn.Conv2d)


@pytest.mark.slow
def test_quantized_after_it_in_one_run(tmp_path):
    quantization = PostTrainingQuantization(Quantizer(num_images=64), max_drop=1.0, latency=False)
    run = fit(tmp_path, low_rank(1, report=True), quantization, epochs=2).run
    with run.report.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["dense", "low_rank", "int8"]
    assert rows[2]["macs"] == rows[1]["macs"] and rows[2]["file"] == "model_int8.onnx"


CONFIG = """
data:
  class_path: project.data.Digits
  init_args: {batch_size: 64}
model:
  net: helpers.pruning_run.TinyNet
  schedule: {class_path: project.learning.Linear}
trainer:
  max_epochs: 4
  limit_train_batches: 6
  accelerator: cpu
  observe: false
  test_after_fit: false
  callbacks:
    - class_path: helpers.pruning_run.Brake
    - class_path: project.callbacks.LowRank
      init_args:
        begin_epoch: 2
        report: false
        factorizer:
          class_path: project.compression.Factorizer
          init_args: {macs_left: 0.6, round_to: 2, num_images: 64}
    - class_path: project.callbacks.EMA
      init_args: {decay: 0.9}
"""


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(tmp_path):
    """SIGKILL in the dense training, within an epoch's length after the factorisation has begun, and later."""
    config, errors = tmp_path / "low_rank.yaml", tmp_path / "errors.txt"
    config.write_text(CONFIG)

    def start(experiment: str, *, resume: bool = False) -> subprocess.Popen[bytes]:
        folder = tmp_path / experiment
        which = ["--resume", str(folder)] if resume else ["--config", str(config), "--trainer.experiment", experiment]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        with errors.open("a") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "project", "fit", *which, "--trainer.logs_dir", str(tmp_path)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    whole = start("whole")
    assert whole.wait(timeout=300) == 0, errors.read_text()
    steps = tmp_path / "killed/version_0/steps.txt"
    for number, step in enumerate((STEPS + 2, 2 * STEPS, 3 * STEPS + 1)):
        process, deadline = start("killed", resume=number > 0), time.monotonic() + 300
        while not steps.is_file() or int((steps.read_text().split() or [-1])[-1]) < step:
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.002)
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
        steps.unlink()
    last = start("killed", resume=True)
    assert last.wait(timeout=300) == 0, errors.read_text()
    assert_same_runs(Run.find(tmp_path / "killed"), Run.find(tmp_path / "whole"))
