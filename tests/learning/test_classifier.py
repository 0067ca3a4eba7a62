"""The LightningModule: checkpoints, parameter groups, scaled rates, penalties, soft targets."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from helpers.slow import fast
from torch import nn

from project.compression import plan_thinning
from project.data import Digits, MixUp
from project.frame import trust
from project.frame.verbs import Trainer
from project.learning.schedules import Linear
from project.losses import CrossEntropy, MaxNorm, Penalties
from project.models import Classifier, SmallInception

SHAPE = (1, 8, 8)


def net() -> SmallInception:
    return SmallInception(10, SHAPE, width=0.25)


def trainer(**options) -> Trainer:
    quiet = {"observe": False, "enable_progress_bar": False, "log_every_n_steps": 1, "test_after_fit": False}
    return Trainer(accelerator="cpu", **{**quiet, "max_epochs": 1, "limit_train_batches": 3, **options})


def test_surgery_is_in_the_checkpoint_and_the_net_before_it_is_not(tmp_path):
    """A thinned net's checkpoint holds its own weights alone, and other classifiers follow it there and back."""
    model = Classifier(net(), 10, SHAPE)
    dense = trainer(enable_checkpointing=False)
    dense.fit(model, datamodule=Digits(batch_size=64))
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    num_dense = sum(p.numel() for p in model.parameters())
    model.operate_(plan_thinning(model.net, {"blocks.1.branches.conv1x1.conv": [0, 1, 2]}, SHAPE))
    num_thin = sum(p.numel() for p in model.parameters())
    assert num_thin < num_dense
    dense.save_checkpoint(tmp_path / "thin.ckpt")
    saved = torch.load(tmp_path / "thin.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("net.") for key in saved)
    assert sum(saved[f"net.{name}"].numel() for name, _ in model.net.named_parameters()) == num_thin

    other = Classifier(net(), 10, SHAPE)
    for name, count in (("thin", num_thin), ("dense", num_dense), ("thin", num_thin)):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(checkpoint["state_dict"])
        assert sum(p.numel() for p in other.parameters()) == count


def test_a_checkpoint_alone_brings_the_classifier_back(command, digits, logs):
    """Written by the command line: net, loss and optimizer are rebuilt from plain values, ``weights_only``."""
    assert command("fit", *digits, "--trainer.max_epochs=1")[0] == 0
    path = logs / "digits" / "version_0" / "checkpoints" / "best.ckpt"
    loaded = Classifier.load_from_checkpoint(path, weights_only=True)
    assert isinstance(loaded.net, SmallInception) and loaded.loss.label_smoothing == 0.1
    assert loaded.class_names == tuple("0123456789") and loaded.image_shape == SHAPE
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in loaded.state_dict().items())
    assert saved.keys() == loaded.state_dict().keys()


@pytest.mark.parametrize("described", fast(["project.models.LeNet300100", "helpers.foreign_nets.build_digits"]))
def test_lightnings_own_class_loads_a_checkpoint_too(described, command, digits, logs, monkeypatch):
    """As in a notebook, also with a function that makes the net, and from a checkpoint of before."""
    options = ["--trainer.max_epochs=1", "--trainer.test_after_fit=false", f"--model.net={described}"]
    status, _, err = command("fit", digits[0], digits[1], *options)
    assert status == 0, err
    path = logs / "digits" / "version_0" / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    if described.startswith("helpers"):
        with pytest.raises(ValueError, match=r"not loaded by Classifier\.load_from_checkpoint needs helpers"):
            pl.LightningModule.load_from_checkpoint(path)
        monkeypatch.setattr(trust, "trusted", ["helpers.foreign_nets"])
    for loaded in (pl.LightningModule.load_from_checkpoint(path), Classifier.load_from_checkpoint(path)):
        assert type(loaded) is Classifier and loaded.hparams["net"]["class_path"] == described
        assert all(torch.equal(value, checkpoint["state_dict"][key]) for key, value in loaded.state_dict().items())
    checkpoint["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    torch.save(checkpoint, path)
    assert type(Classifier.load_from_checkpoint(path)) is Classifier


def test_built_in_python_a_checkpoint_still_holds_plain_values_only(logs):
    model = Classifier(net(), 10, SHAPE)
    trainer(experiment="python").fit(model, datamodule=Digits(batch_size=64))
    path = logs / "python" / "version_0" / "checkpoints" / "last.ckpt"
    loaded = Classifier.load_from_checkpoint(path, net=net(), weights_only=True)
    assert loaded.num_classes == 10
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_weight_decay_spares_norms_and_biases(logs):
    model = Classifier(net(), 10, SHAPE)
    run = trainer()
    run.fit(model, datamodule=Digits(batch_size=64))
    decayed, spared = run.optimizers[0].param_groups
    assert decayed["weight_decay"] == 5e-4 and all(p.dim() > 1 for p in decayed["params"])
    assert spared["weight_decay"] == 0 and all(p.dim() == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("base", "accumulate", "expected"), [(None, 1, 0.1), (32, 1, 0.2), (32, 2, 0.4), (128, 1, 0.05)]
)
def test_linear_scaling_rule(base, accumulate, expected, logs):
    model = Classifier(net(), 10, SHAPE, base_batch_size=base)
    run = trainer(accumulate_grad_batches=accumulate)
    run.fit(model, datamodule=Digits(batch_size=64))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)


def test_penalties_and_max_norm_act(logs):
    torch.manual_seed(0)
    options = {"penalties": Penalties(l1_fc=0.5), "max_norm": MaxNorm(conv=0.7)}
    model = Classifier(net(), 10, SHAPE, **options)
    before = model.net.fc.weight.abs().sum().item()
    trainer(limit_train_batches=20).fit(model, datamodule=Digits(batch_size=64))
    assert model.net.fc.weight.abs().sum().item() < 0.5 * before
    for module in model.net.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.flatten(1).norm(dim=1).max() <= 0.7 + 1e-5


def test_mixed_targets_train(logs):
    model = Classifier(net(), 10, SHAPE, loss=CrossEntropy(0.1), schedule=Linear())
    run = trainer()
    run.fit(model, datamodule=Digits(batch_size=64, mix=MixUp(0.4)))
    assert 0 <= run.callback_metrics["train/accuracy"] <= 1


def test_dropout_draws_depend_on_seed_and_epoch_alone(logs, monkeypatch):
    def weights(draws: int) -> torch.Tensor:
        pl.seed_everything(3, verbose=False)
        model = Classifier(SmallInception(10, SHAPE, width=0.25, fc_dropout=0.5), 10, SHAPE)
        torch.rand(draws)
        trainer(enable_checkpointing=False).fit(model, datamodule=Digits(batch_size=64))
        return model.net.fc.weight.detach()

    assert torch.equal(weights(0), weights(17))


def test_compiled_checkpoints_have_the_plain_nets_keys(monkeypatch):
    model = Classifier(net(), 10, SHAPE, compile=True)
    keys = list(model.state_dict())
    compiled = []
    monkeypatch.setattr(model.net, "compile", partial(compiled.append, 1))
    model.setup("fit")
    assert compiled and list(model.state_dict()) == keys


@pytest.mark.slow
def test_a_compiled_run_tests_and_loads(command, digits, logs):
    status, _, err = command("fit", *digits, "--model.compile=true", "--trainer.max_epochs=1")
    assert status == 0, err
    path = logs / "digits" / "version_0" / "checkpoints" / "best.ckpt"
    assert not any("_orig_mod" in key for key in torch.load(path, weights_only=True)["state_dict"])
    assert command("test", "--run", str(logs / "digits"), "--model.compile=false")[0] == 0


def test_calibration_error_is_that_of_the_probabilities(logs):
    """A net that says one class with logit 2, right half of the time: |confidence - accuracy| by hand."""

    class Stubborn(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[2.0, 0.0]]).expand(len(images), 2)

    model = Classifier(Stubborn(), 2, SHAPE, channels_last=False)
    loader = torch.utils.data.DataLoader([(torch.zeros(SHAPE), label) for label in (0, 1)], batch_size=2)
    run = trainer()
    metrics = run.test(model, loader, verbose=False)[0]
    assert metrics["test/accuracy"] == 0.5
    assert metrics["test/calibration_error"] == pytest.approx(
        torch.tensor([2.0, 0.0]).softmax(0)[0].item() - 0.5, abs=1e-6
    )


def test_refusals():
    with pytest.raises(ValueError, match="base_batch_size is 0"):
        Classifier(net(), 10, SHAPE, base_batch_size=0)
