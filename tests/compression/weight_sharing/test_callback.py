"""Weights are shared once all else is trained, learn as few values, and lie so in the file."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.pruning_run import (
    NUM_PRUNED,
    STEPS,
    DigitsOnce,
    FailBetween,
    Outcome,
    Watch,
    assert_same_runs,
    differences,
    fit,
    pruning,
    same,
    state_of,
    weights_of,
)
from helpers.stop_after import StopAfter
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from project.callbacks import (
    EMA,
    DistillFrom,
    LowRank,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    WeightSharing,
)
from project.compression import Codebook, Gradual, Iterative, OneShot, Pruner, Sharer
from project.compression.report import _accuracy
from project.compression.report_rows import read_report
from project.compression.weight_sharing.checks import check_sharing
from project.frame.paths import Run
from project.learning.checkpoints import load_net
from project.losses import MaxNorm
from project.models import Classifier

SHARED = ("conv1.conv.weight", "conv2.conv.weight", "fc.weight")


def sharing(bits: int = 3, **options: Any) -> WeightSharing:
    """Without the measurements at the end, and on few images."""
    options = {"sharer": Sharer(bits=bits), "report": False, "num_images": 128, **options}
    return WeightSharing(**options)


def assert_finished(path: Path, bits: int = 3, vector_bits: int = 8) -> None:
    """What the packed file counts on, on the file."""
    weights = weights_of(path)
    for name, value in weights.items():
        if name in SHARED:
            values = value[value != 0].unique()
            assert len(values) <= 2**bits and torch.equal(values.half().float(), values), name
        elif name.endswith("running_mean"):
            assert not value.any(), name
        elif name.endswith("running_var"):
            assert torch.equal(value, torch.full_like(value, 1 - 1e-5)), name
        elif value.is_floating_point():
            steps = [2.0**exponent for exponent in range(-40, 10)]
            on_grid = (step for step in reversed(steps) if torch.equal(value / step, (value / step).round()))
            assert (value / next(on_grid)).abs().max() < 2 ** (vector_bits - 1), name


def state_in(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["callbacks"]["WeightSharing"]


def test_dense_then_shared_in_one_run(tmp_path):
    watch = Watch()
    outcome = fit(tmp_path / "shared", sharing(), watch)
    plain = fit(tmp_path / "plain")
    run = outcome.run
    assert outcome.trainer.global_step == 4 * STEPS and outcome.trainer.max_epochs == 2
    # until then nothing is different
    assert not differences(weights_of(run.level_checkpoint(0)), weights_of(plain.run.best_checkpoint))
    # what is shared is the level's net, by k-means
    net = load_net(outcome.model, run.level_checkpoint(0))
    Codebook.of(net, Sharer(bits=3).layers(net)).write_(net)
    assert not differences(state_of(net), watch.before[2 * STEPS].weights)
    # from then on values are few, and learn; biases and norms too
    for step in range(2 * STEPS, 4 * STEPS):
        before, after = watch.before[step].weights, watch.after[step].weights
        assert all(len(after[name].unique()) <= 8 for name in SHARED)
        learned = {"conv2.conv.weight", "conv2.norm.weight", "fc.bias"} & set(differences(before, after))
        assert len(learned) == 3, step
    for path in (run.best_checkpoint, run.level_checkpoint(1)):
        assert_finished(path)
    assert weights_of(run.best_checkpoint).keys() == weights_of(run.level_checkpoint(0)).keys()


def test_finishing_loses_nothing_but_rounding(tmp_path):
    """The best of the shared epochs, with 16-bit vectors and its own statistics, is the net in the file."""
    outcome = fit(tmp_path, sharing(bits=5, vector_bits=16, num_images=0, epochs=1))
    images = DigitsOnce(batch_size=64, seed=0)
    images.setup("fit")
    x, _ = images.sample(200)
    raw, finished = (
        load_net(outcome.model, path) for path in (outcome.run.last_checkpoint, outcome.run.best_checkpoint)
    )
    with torch.no_grad():
        assert torch.allclose(raw(x), finished(x), rtol=1e-3, atol=1e-3)
        assert not torch.equal(raw(x), finished(x))


def test_values_learn_what_the_first_ones_could_not(tmp_path):
    """Two bits for a layer: training recovers more than half of what k-means alone loses."""

    class Loss(Callback):
        values: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.values.append(float(outputs["loss"]))

    loss = Loss()
    fit(tmp_path, sharing(bits=2, epochs=8, lr=0.03), loss, epochs=14)
    dense, first, last = (sum(loss.values[at:][:3]) / 3 for at in (14 * STEPS - 3, 14 * STEPS, 22 * STEPS - 3))
    assert first > dense + 0.1 and last - dense < 0.5 * (first - dense), (dense, first, last)


def test_after_pruning_zeros_hold_and_the_levels_stay(tmp_path):
    callbacks = [pruning(schedule=Iterative(0.4, 2), report=True, latency=False), sharing(report=True, latency=False)]
    outcome = fit(tmp_path, *callbacks)
    run, masks = outcome.run, callbacks[0].masks
    assert [path.name for path in sorted(run.checkpoints.glob("level_*"))] == [f"level_{n}.ckpt" for n in range(4)]
    pruned, shared = weights_of(run.level_checkpoint(2)), weights_of(run.level_checkpoint(3))
    for name, mask in masks.items():
        assert not shared[name][mask == 0].any() and torch.equal(shared[name] == 0, pruned[name] == 0)
    assert sum(int((pruned[name] == 0).sum()) for name in masks) == round(0.6405 * NUM_PRUNED)
    assert len(pruned["conv2.conv.weight"].unique()) > 100
    assert_finished(run.best_checkpoint)
    rows = read_report(run.report)
    assert [row.step for row in rows] == ["dense", "pruned 40.03 %", "pruned 64.05 %", "weight_sharing"]
    assert rows[-1].num_nonzero <= rows[-2].num_nonzero < rows[0].num_nonzero
    data = DigitsOnce(batch_size=64, seed=0)
    assert rows[-1].test_accuracy == _accuracy(load_net(outcome.model, run.best_checkpoint), data, "test")
    assert rows[-1].file == "level_3.ckpt" and rows[-1].val_accuracy is not None


def test_after_gradual_pruning_with_its_own_teacher(tmp_path):
    callbacks = [pruning(schedule=Gradual(0.6, 0.2, 1.0, every_n_steps=2)), sharing(), DistillFrom()]
    taught: list[bool] = []

    class Taught(Callback):
        def on_train_batch_start(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
            taught.append(pl_module.distillation is not None)

    outcome = fit(tmp_path, *callbacks, Taught(), epochs=3)
    assert taught == [False] * 3 * STEPS + [True] * 2 * STEPS
    assert_finished(outcome.run.best_checkpoint)
    assert (weights_of(outcome.run.best_checkpoint)["conv2.conv.weight"] == 0).float().mean() > 0.5


def test_a_budget_chooses_the_bits(tmp_path):
    callback = sharing(sharer=Sharer(budget_bytes=600, start="linear", num_images=64))
    run = fit(tmp_path, callback, epochs=1).run
    bits = torch.load(run.best_checkpoint, weights_only=True)["weight_sharing"]
    assert len(set(bits.values())) > 1 and bits == callback.bits
    for name, number in bits.items():
        assert len(weights_of(run.best_checkpoint)[name].unique()) <= 2**number


def test_a_layer_that_is_left_alone_goes_on_as_it_was(tmp_path):
    watch = Watch()
    run = fit(tmp_path, sharing(sharer=Sharer(exclude=["fc"])), watch).run
    best = weights_of(run.best_checkpoint)
    assert len(best["fc.weight"].unique()) > 100 and len(best["conv2.conv.weight"].unique()) <= 16
    assert "fc.weight" in differences(watch.before[3 * STEPS].weights, watch.after[3 * STEPS].weights)


def test_half_precision(tmp_path):
    assert_finished(fit(tmp_path, sharing(), precision="bf16-mixed").run.best_checkpoint)


def test_a_trained_run_is_shared_at_once(tmp_path):
    """``fit --ckpt_path`` from another run's last checkpoint, with the same max_epochs."""
    trained = fit(tmp_path / "trained", epochs=3)
    outcome = share_from(trained, tmp_path / "shared", epochs=3)
    first = weights_of(outcome.run.level_checkpoint(0))
    assert not differences(first, weights_of(trained.run.last_checkpoint))
    assert_finished(outcome.run.best_checkpoint)
    with pytest.raises(ValueError, match="max_epochs is 2, but the checkpoint has trained for 3 epochs"):
        share_from(trained, tmp_path / "refused", epochs=2)


def test_a_thinned_net_is_shared_at_once(tmp_path):
    units = pruning(schedule=Gradual(0.5, 0.2, 1.0), pruner=Pruner("units", scope="layer"))
    thinned = fit(tmp_path / "thinned", units)
    outcome = share_from(thinned, tmp_path / "shared", epochs=0, checkpoint=thinned.run.best_checkpoint)
    assert outcome.trainer.global_step == 2 * STEPS
    assert weights_of(outcome.run.best_checkpoint)["conv2.conv.weight"].shape == (8, 4, 3, 3)
    assert_finished(outcome.run.best_checkpoint)
    with pytest.raises(ValueError, match="max_epochs is 0"):
        fit(tmp_path / "refused", sharing(), epochs=0)


def test_a_net_that_loses_units_is_shared_in_the_same_run(tmp_path):
    units = pruning(schedule=OneShot(0.5), pruner=Pruner("units", scope="layer"), epochs_per_round=1)
    outcome = fit(tmp_path, units, sharing())
    assert weights_of(outcome.run.level_checkpoint(1))["conv2.conv.weight"].shape == (8, 4, 3, 3)
    assert weights_of(outcome.run.best_checkpoint)["conv2.conv.weight"].shape == (8, 4, 3, 3)
    assert_finished(outcome.run.best_checkpoint)


def share_from(trained: Outcome, folder: Path, epochs: int, checkpoint: Path | None = None) -> Outcome:
    from helpers.pruning_run import TinyNet, sgd

    from project.frame.verbs import Trainer

    model = Classifier(TinyNet(), 10, (1, 8, 8), optimizer=sgd)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "observe": False, "enable_progress_bar": False}
    trainer = Trainer(
        experiment="pruning",
        logs_dir=str(folder),
        callbacks=[sharing()],
        max_epochs=epochs,
        limit_train_batches=STEPS,
        num_sanity_val_steps=0,
        test_after_fit=False,
        **options,
    )
    data = DigitsOnce(batch_size=64, seed=0)
    trainer.fit(model, datamodule=data, ckpt_path=str(checkpoint or trained.run.last_checkpoint))
    assert trainer.run is not None
    return Outcome(trainer, model, trainer.run)


# -- resumed ---------------------------------------------------------------------------------------------------------

CALLBACKS = {
    "dense": lambda: [sharing(epochs=3)],
    "pruned, EMA": lambda: [EMA(0.8), pruning(schedule=Iterative(0.4, 1), epochs_per_round=1), sharing(epochs=3)],
    "budget": lambda: [sharing(sharer=Sharer(budget_bytes=700, start="linear", num_images=64), epochs=3), EMA(0.5)],
}


def assert_same_sharing(resumed: Run, whole: Run) -> None:
    assert_same_runs(resumed, whole)
    assert same(*(state_in(run.last_checkpoint) for run in (resumed, whole)))
    assert state_in(whole.last_checkpoint)["num_steps"] == 3 * STEPS


@pytest.mark.parametrize(
    "callbacks", [pytest.param(name, marks=[] if "pruned" in name else pytest.mark.slow) for name in CALLBACKS]
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, callbacks):
    make, epochs = CALLBACKS[callbacks], 2 if "pruned" not in callbacks else 1
    whole = fit(tmp_path / "whole", *make(), epochs=epochs)
    run = None
    for number, stop in enumerate((2, 3, 4, 99)):
        outcome = fit(tmp_path / "resumed", *make(), StopAfter(stop), epochs=epochs, seed=number, resume=run)
        run = outcome.run
        assert run.best_checkpoint.is_file() and outcome.trainer.global_step == STEPS * min(stop, 5)
    assert_same_sharing(run, whole.run)
    assert_finished(run.best_checkpoint, bits=8 if callbacks == "budget" else 3)
    again = fit(tmp_path / "resumed", *make(), epochs=epochs, seed=9, resume=run).run  # of a run that is over
    assert_same_sharing(again, whole.run)


def test_the_rate_of_the_values_goes_on_at_its_share(tmp_path):
    """A resume with half as many steps an epoch ends with the rate of the last step, not before."""

    class Rates(Callback):
        def on_train_batch_end(self, trainer: LightningTrainer, *_: object) -> None:
            group = callback._optimizer.param_groups[0]
            self.seen.append(group["lr"] / group["scale"] / callback.lr)

        def __init__(self) -> None:
            self.seen: list[float] = []

    callback = sharing(epochs=4)
    run = fit(tmp_path, callback, StopAfter(4)).run
    callback = sharing(epochs=4)
    rates = Rates()
    fit(tmp_path, callback, rates, seed=1, resume=run, accumulate_grad_batches=2)
    steps = 4 * STEPS // 2
    expected = [(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps // 2, steps)]
    assert rates.seen[1::2] == pytest.approx(expected)


class FailAtStep(Callback):
    """Ends the process in the backward pass of a step, half a codebook's step away from the next."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("no power")


@pytest.mark.parametrize(
    "moment",
    [
        "in an epoch",
        "finishing",
        pytest.param("first step", marks=pytest.mark.slow),
        pytest.param("between checkpoints", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_never_killed(tmp_path, moment, monkeypatch):
    make = CALLBACKS["pruned, EMA"]
    whole = fit(tmp_path / "whole", *make(), epochs=1).run
    killers: dict[str, list[Callback]] = {
        "first step": [FailAtStep(2 * STEPS)],
        "in an epoch": [FailAtStep(3 * STEPS + 2)],
        "between checkpoints": [FailBetween(2)],
        "finishing": [],
    }
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no power"):
        if moment == "finishing":  # best.ckpt is finished, its copy is not there yet
            patch.setattr("project.compression.weight_sharing.callback.keep_best_as", _fail_at_level(2))
        fit(tmp_path / "resumed", *make(), *killers[moment], epochs=1)
    run = Run(tmp_path / "resumed/pruning/version_0")
    run.config.touch()
    same_checkpoint = [FailBetween(99)] if moment == "between checkpoints" else []
    resumed = fit(tmp_path / "resumed", *make(), *same_checkpoint, epochs=1, seed=1, resume=run).run
    assert_same_sharing(resumed, whole)


def _fail_at_level(number: int) -> Any:
    from project.callbacks.checkpoint import keep_best_as

    def keep(run: Run, level: int) -> None:
        if level == number:
            raise RuntimeError("no power")
        keep_best_as(run, level)

    return keep


# -- refused ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[Callback], str]] = {
    "before pruning": ([sharing(), pruning()], "put the pruning first"),
    "aware": ([QuantizationAwareTraining(0), sharing()], "WeightSharing and QuantizationAwareTraining"),
    "thin layers": ([LowRank(1), sharing()], "both end a run"),
    "int8": ([sharing(), PostTrainingQuantization()], "WeightSharing and PostTrainingQuantization"),
    "early": ([EarlyStopping("val/loss"), sharing()], "EarlyStopping"),
    "teacher": ([DistillFrom(), sharing()], "put DistillFrom after it"),
    "no layer": ([sharing(sharer=Sharer(exclude=["head"]))], "exclude has 'head'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_before_the_first_step(tmp_path, name):
    callbacks, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, *callbacks)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"finetune_lr": -1.0}, "finetune_lr is -1.0"),
        ({"vector_bits": 1}, "vector_bits is 1"),
        ({"num_images": -1}, "num_images is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeightSharing(**options)


def test_other_options_of_the_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leave max_steps out"):
        fit(tmp_path, sharing(), max_steps=5)
    with pytest.raises(ValueError, match="checkpoints are written every 3 epochs"):
        fit(tmp_path, sharing(), check_val_every_n_epoch=3)


@pytest.mark.parametrize(
    ("model", "precision", "message"),
    [
        (nn.Linear(2, 2), "32-true", "the model is a Linear"),
        (Classifier(nn.Linear(2, 2), max_norm=MaxNorm(conv=3.0)), "32-true", "max_norm is set"),
        (Classifier(nn.Linear(2, 2)), "16-mixed", "choose bf16-mixed"),
    ],
)
def test_other_models_are_refused(model, precision, message):
    trainer = SimpleNamespace(max_epochs=2, max_steps=-1, fast_dev_run=False, precision=precision)
    with pytest.raises(ValueError, match=message):
        check_sharing(trainer, model, sharing(), 2)


def test_a_fast_dev_run_shares_nothing(tmp_path):
    callback = sharing(epochs=1)
    torch.manual_seed(0)
    from helpers.pruning_run import TinyNet

    from project.frame.verbs import Trainer

    trainer = Trainer(fast_dev_run=True, callbacks=[callback], accelerator="cpu", logger=False, observe=False)
    trainer.fit(Classifier(TinyNet(), 10, (1, 8, 8)), datamodule=DigitsOnce(batch_size=64, seed=0))
    assert callback.codebook is None
