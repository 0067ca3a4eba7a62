"""How techniques meet what else a run may hold: other callbacks, an error, shared weights, nets of other techniques."""

from pathlib import Path

import pytest
import torch
from helpers.pruning_run import DigitsOnce, TinyNet, fit, pruning, sgd, weights_of
from helpers.stop_after import StopAfter
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from project.callbacks import EMA, LowRank, QuantizationAwareTraining, TernaryWeights, WeightSharing, XNORNet
from project.compression import Factorizer, OneShot, Pruner
from project.compression.low_bit.ternary import Freezing, LowBitWeights
from project.compression.low_bit.xnor import BinarizeInputs
from project.compression.pruning.masks import apply_masks_, sparsity
from project.frame import verbs
from project.models import Classifier


def low_rank(begin_epoch: int = 1) -> LowRank:
    factorizer = Factorizer(macs_left=0.6, round_to=2, num_images=64)
    return LowRank(begin_epoch, factorizer, 0.5, report=False, latency=False)


def quiet_trainer(folder: Path, callbacks: list[Callback], **options: object) -> verbs.Trainer:
    options = {"max_epochs": 1, "limit_train_batches": 6, "accelerator": "cpu", **options}
    return verbs.Trainer(
        logs_dir=str(folder), callbacks=callbacks, test_after_fit=False, logger=False, observe=False,
        enable_progress_bar=False, **options,
    )  # fmt: skip


def classifier() -> Classifier:
    return Classifier(TinyNet(), 10, (1, 8, 8), optimizer=sgd)


# -- other callbacks --------------------------------------------------------------------------------------------------


def test_a_checkpoint_callback_of_ones_own_does_not_bring_the_dense_net_back(tmp_path):
    first_epoch_is_best = ModelCheckpoint(monitor="val/loss", mode="max", filename="{epoch}")
    run = fit(tmp_path, low_rank(), first_epoch_is_best, epochs=3).run
    checkpoint = torch.load(run.best_checkpoint, weights_only=True)
    assert [surgery["type"] for surgery in checkpoint["surgeries"]] == ["Factorize"]


@pytest.mark.parametrize("late", [low_rank(2), XNORNet(2, report=False), TernaryWeights("ttq", 2, report=False)])
def test_a_technique_that_no_checkpoint_would_hold_is_refused(tmp_path, late):
    with pytest.raises(ValueError, match="begin_epoch is 2, but the last checkpoint is written after epoch 2"):
        fit(tmp_path, late, epochs=3, check_val_every_n_epoch=2)


@pytest.mark.parametrize("ema_first", [False, True])
def test_averages_of_frozen_weights_have_three_values(tmp_path, ema_first):
    callbacks = [TernaryWeights("twn", freeze=[0.5, 1.0], report=False), EMA(0.9)]
    run = fit(tmp_path, *(reversed(callbacks) if ema_first else callbacks), epochs=4).run
    assert len(weights_of(run.best_checkpoint)["conv2.conv.weight"].unique()) == 3


def test_two_roundings_are_refused(tmp_path):
    two = TernaryWeights(include=["conv1"], report=False), XNORNet(include=["conv2"], report=False)
    with pytest.raises(ValueError, match="both round the weights: remove one"):
        fit(tmp_path, *two, epochs=1)


def test_a_scale_of_each_unit_of_ones_own_is_refused_with_shared_weights(tmp_path):
    class Limit(nn.Module):
        def forward(self, net: nn.Module) -> None: ...

    module = Classifier(TinyNet(), 10, (1, 8, 8), optimizer=sgd, max_norm=Limit())
    with pytest.raises(ValueError, match="remove max_norm"):
        quiet_trainer(tmp_path, [WeightSharing()]).fit(module, datamodule=DigitsOnce(batch_size=64, seed=0))


# -- the end of a fit -------------------------------------------------------------------------------------------------


class Boom(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("technique", "epochs"),
    [
        (lambda: pruning(schedule=OneShot(0.5), epochs_per_round=1), 2),
        (lambda: WeightSharing(epochs=1, report=False, latency=False), 2),
        (low_rank, 3),
        (lambda: XNORNet(1, report=False), 3),
    ],
    ids=["pruning", "sharing", "low rank", "xnor"],
)
def test_an_error_leaves_the_trainer_and_the_model_as_they_were(tmp_path, technique, epochs):
    module, trainer = classifier(), quiet_trainer(tmp_path, [technique(), Boom()], max_epochs=epochs)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(module, datamodule=DigitsOnce(batch_size=64, seed=0))
    assert trainer.max_epochs == epochs and module.phase is None


def test_an_error_before_the_setup_changes_nothing(tmp_path):
    class Refuses(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            raise RuntimeError("no")

    sharing = WeightSharing(epochs=1, report=False, latency=False)
    trainer = quiet_trainer(tmp_path, [Refuses(), pruning(schedule=OneShot(0.5)), sharing], max_epochs=2)
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(classifier(), datamodule=DigitsOnce(batch_size=64, seed=0))
    assert trainer.max_epochs == 2


def test_validation_after_a_fit_measures_the_net_as_it_is(tmp_path):
    outcome = fit(tmp_path, TernaryWeights("ttq", report=False))
    outcome.trainer.validate(outcome.model, datamodule=DigitsOnce(batch_size=64, seed=0))
    assert "forward" not in vars(outcome.model.net)


def test_one_batch_of_a_debug_run_trains_before_the_first_rounded_epoch(tmp_path):
    trainer = quiet_trainer(tmp_path, [QuantizationAwareTraining(1)], fast_dev_run=True, limit_train_batches=None)
    trainer.fit(classifier(), datamodule=DigitsOnce(batch_size=64, seed=0))
    assert trainer.state.finished


# -- names of layers --------------------------------------------------------------------------------------------------


def test_xnor_finds_its_layers_again_in_a_resumed_run(tmp_path):
    def xnor() -> XNORNet:
        return XNORNet(1, include=[r"conv$", "fc"], exclude=["conv1"], report=False)

    stopped = fit(tmp_path, xnor(), StopAfter(3), epochs=4).run
    resumed = xnor()
    run = fit(tmp_path, resumed, epochs=4, seed=1, resume=stopped).run
    assert resumed.low_bit.layers == ["conv2.conv.layer", "fc.layer"]
    for weight in weights_of(run.best_checkpoint)["conv2.conv.layer.weight"].flatten(1):
        assert len(weight.unique()) <= 2


def test_ternary_weights_follow_a_factorised_net(tmp_path):
    first, ternary = fit(tmp_path / "a", low_rank(), epochs=2).run, TernaryWeights(report=False)
    quiet_trainer(tmp_path / "b", [ternary]).fit(
        classifier(), datamodule=DigitsOnce(batch_size=64, seed=0), ckpt_path=str(first.best_checkpoint)
    )
    assert ternary.low_bit.layers == ["conv2.conv.0", "conv2.conv.1"]


# -- kinds of nets ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(self.stem(x).relu()).relu()).mean((2, 3)))


@pytest.mark.parametrize("pruner", [Pruner(criterion=c) for c in ("magnitude", "random", "gradient", "obd", "taylor")])
def test_a_weight_of_two_layers_is_pruned_once(pruner):
    net, images, labels = Tied(), torch.randn(8, 1, 8, 8), torch.arange(8)
    masks = pruner.prune(net, pruner.groups(net, (1, 8, 8)), {}, 0.5, images=images, labels=labels)
    apply_masks_(net, masks)
    zeros = sum(int((weight == 0).sum()) for weight in (net.stem.weight, net.a.weight))
    assert zeros == pytest.approx(0.5 * (net.stem.weight.numel() + net.a.weight.numel()), abs=1)
    assert sparsity(masks, net) == pytest.approx(0.5, abs=0.01)


def test_a_weight_of_an_excluded_layer_is_not_pruned():
    net, pruner = Tied(), Pruner(exclude=["^b$", "fc"])
    masks = pruner.prune(net, pruner.groups(net, (1, 8, 8)), {}, 0.5)
    assert list(masks) == ["stem.weight"]


def test_units_of_several_rows_have_a_last_weight():
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    pruner = Pruner(budget="effective")
    masks = pruner.prune(net, pruner.groups(net, (1, 8, 8)), {}, 0.5)
    assert sparsity(masks, net) == pytest.approx(0.5, abs=0.01)


def test_units_without_a_norm_are_refused_before_the_training(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    trainer = quiet_trainer(tmp_path, [pruning(pruner=Pruner("units", criterion="norm_scale"))], max_epochs=2)
    with pytest.raises(ValueError, match="criterion is norm_scale, but it cannot score"):
        trainer.fit(Classifier(net, 10, (1, 8, 8), optimizer=sgd), datamodule=DigitsOnce(batch_size=64, seed=0))
    assert trainer.global_step == 0


def test_a_weight_of_zeros_loses_nothing_at_the_lowest_rank():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10))
    nn.init.zeros_(net[2].weight)
    surgery, _ = Factorizer(ranks="energy", energy=0.5, round_to=1, num_images=0).plan(net, (1, 8, 8))
    assert surgery.ranks["2"] == [1]


def test_a_frozen_filter_keeps_the_scale_of_its_layer():
    net = nn.Sequential(nn.Linear(4, 2, bias=False))
    weight, freezing = net[0].weight, Freezing(LowBitWeights("twn", ["0"]))
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0] * 4, [0.01] * 4]))
    freezing.freeze_(net, 0.5)
    with torch.no_grad():
        weight[1] = 0.9
    freezing.freeze_(net, 1.0)
    assert (weight == 1).all()


def test_binary_inputs_have_the_type_of_the_net():
    net = nn.Sequential(nn.Linear(4, 4)).double()
    BinarizeInputs(["0"]).apply_(net)
    assert net(torch.rand(3, 4).double()).dtype == torch.float64
