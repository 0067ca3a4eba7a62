"""The base of data modules, on real digits: batches, augmentation, order, resuming, bad numbers, configuration."""

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import project.data
from project.data import CutMix, Digits, HorizontalFlip, ImageDataModule, ImageFolder, MixUp, PadCrop

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Probe(LightningModule):
    """Remembers the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        self.num_val = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        self.seen.append((self.current_epoch, images.clone(), targets.clone()))
        return nn.functional.cross_entropy(self.head(images.flatten(1)), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        self.num_val += len(images)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(batch[0].flatten(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(max_epochs: int = 2, **kwargs: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"accelerator": "cpu", "max_epochs": max_epochs, "log_every_n_steps": 1, **quiet, **kwargs})


def digits(**kwargs: Any) -> Digits:
    return Digits(**{"batch_size": 300, "seed": 0, **kwargs})


def test_digits() -> None:
    data = digits(val_fraction=0.1)
    data.setup()
    parts = (data.train_data, data.val_data, data.test_data)
    assert [len(part) for part in parts if part is not None] == [1294, 144, 359]
    images, labels = data.load(train=True)
    assert images.shape == (1438, 1, 8, 8) and images.dtype == torch.uint8 and images.max() == 255
    assert float(images.float().mean() / 255) == pytest.approx(data.mean[0], abs=1e-3)
    assert float(images.float().std() / 255) == pytest.approx(data.std[0], abs=1e-3)
    test_images, test_labels = data.load(train=False)
    assert (labels.bincount() / 4 - test_labels.bincount()).abs().max() < 1.5
    assert torch.equal(test_images, digits(seed=5, split_seed=9).load(train=False)[0])
    nearest = torch.cdist(test_images.flatten(1).float(), images.flatten(1).float()).argmin(1)
    assert (labels[nearest] == test_labels).float().mean() > 0.97, "labels belong to their images"


def test_fit_sees_augmented_training_and_plain_validation_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.data_connector.suggested_max_num_workers", lambda n: 8)
    model = Probe()
    trainer().fit(model, datamodule=digits(augment=[PadCrop(1), HorizontalFlip()], mix=MixUp(1.0)))
    assert [epoch for epoch, _, _ in model.seen] == [0] * 4 + [1] * 4, "the batch that is not full is dropped"
    for _, images, targets in model.seen:
        assert images.shape == (300, 1, 8, 8) and images.dtype == torch.float32
        assert targets.shape == (300, 10) and torch.allclose(targets.sum(1), torch.ones(300), atol=1e-6)
    assert not torch.equal(model.seen[0][1], model.seen[4][1]), "a new order each epoch"
    assert model.num_val == 3 * 120  # sanity check and two epochs


def test_plain_batches_are_normalised_images_and_labels() -> None:
    model, data = Probe(), digits()
    trainer(1).fit(model, datamodule=data)
    data.trainer = None
    images, labels, _ = next(iter(data.train_dataloader()))
    expected = (images.float() / 255 - data.mean[0]) / data.std[0]
    assert torch.allclose(model.seen[0][1], expected, atol=1e-6) and torch.equal(model.seen[0][2], labels)


class StopAfter(Callback):
    def __init__(self, epoch: int, path: str) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*num_workers.*")
def test_resumed_equals_never_stopped(tmp_path: Any, num_workers: int) -> None:
    def data() -> Digits:
        return digits(augment=[PadCrop(1)], mix=CutMix(), num_workers=num_workers, val_fraction=0.0)

    whole, first, second = Probe(), Probe(), Probe()
    trainer(3).fit(whole, datamodule=data())
    path = str(tmp_path / "stopped.ckpt")
    trainer(3, callbacks=[StopAfter(0, path)]).fit(first, datamodule=data())
    trainer(3).fit(second, datamodule=data(), ckpt_path=path)
    stitched = first.seen + second.seen
    assert len(stitched) == len(whole.seen) == 12
    for (epoch, images, targets), (other_epoch, other_images, other_targets) in zip(whole.seen, stitched, strict=True):
        assert epoch == other_epoch and torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    seen = []
    for batch_size in (100, 300):
        model = Probe()
        trainer(1).fit(model, datamodule=digits(batch_size=batch_size, augment=[PadCrop(2)], val_fraction=0.0))
        seen.append(torch.cat([images for _, images, _ in model.seen])[:1200])
    assert torch.equal(*seen)


def test_nothing_held_out_means_no_validation() -> None:
    model = Probe()
    trainer(1).fit(model, datamodule=digits(val_fraction=0.0))
    assert len(model.seen) == 4 and model.num_val == 0


def test_overfitting_takes_the_same_batch_of_mixed_classes() -> None:
    model = Probe()
    trainer(2, overfit_batches=1).fit(model, datamodule=digits(batch_size=64))
    assert len(model.seen) == 2 and torch.equal(model.seen[0][1], model.seen[1][1])
    assert len(model.seen[0][2].unique()) == 10


def test_predicts_the_test_images() -> None:
    data = digits()
    logits = trainer().predict(Probe(), datamodule=data)
    assert logits is not None and sum(len(part) for part in logits) == 359
    assert data.train_data is None, "loads what the stage needs"


def test_without_a_trainer_batches_are_plain() -> None:
    data = digits(augment=[PadCrop(2)], mix=MixUp())
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64


def test_two_processes_share_the_epochs_images() -> None:
    class FakeTrainer:
        current_epoch, world_size = 3, 2

        def __init__(self, rank: int) -> None:
            self.global_rank = rank
            self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    seen: list[set[int]] = []
    for rank in (0, 1):
        data = digits(batch_size=100)
        data.setup("fit")
        data.trainer = FakeTrainer(rank)  # type: ignore[assignment]
        seen.append(set(torch.cat([indices for _, _, indices in data.train_dataloader()]).tolist()))
    assert len(seen[0]) == len(seen[1]) == 600 and not seen[0] & seen[1]


def test_seed_comes_from_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert digits(seed=None).run_seed == 17 and digits(seed=3).run_seed == 3
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert digits(seed=None).run_seed == 0


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": -0.5}, "val_fraction is -0.5"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_bad_numbers_are_named(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        digits(**kwargs)


def test_batch_larger_than_the_training_set_names_both_numbers() -> None:
    with pytest.raises(ValueError, match="batch_size is 2000, but the training set holds 1318 images"):
        digits(batch_size=2000).setup("fit")


def instantiate(parser: ArgumentParser, config: Any) -> Any:
    """``instantiate_classes`` warns from jsonargparse 4.49 on, which calls it ``instantiate``."""
    build = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return build(config).data


def test_configuration_builds_every_argument() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    config = {
        "class_path": "project.data.FashionMNIST",
        "init_args": {
            "batch_size": 512,
            "augment": [
                {"class_path": "project.data.PadCrop", "init_args": {"padding": 2}},
                {"class_path": "project.data.HorizontalFlip"},
                {"class_path": "project.data.RandomErasing", "init_args": {"value": "random"}},
            ],
            "mix": {"class_path": "project.data.MixUp", "init_args": {"alpha": 0.1}},
        },
    }
    data = instantiate(parser, parser.parse_object({"data": config}))
    assert data.batch_size == 512 and isinstance(data.mix, MixUp) and data.mix.alpha == 0.1
    assert [type(each).__name__ for each in data.augment] == ["PadCrop", "HorizontalFlip", "RandomErasing"]
    assert data.augment[0].padding == 2 and data.augment[2].value == "random"


def test_configuration_of_a_folder_knows_its_own_and_the_shared_arguments(tmp_path: Any) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    own = {"root": str(tmp_path), "image_size": 32, "channels": 1, "random_crop": [0.1, 1.0], "batch_size": 7}
    config = parser.parse_object({"data": {"class_path": "project.data.ImageFolder", "init_args": own}})
    data = instantiate(parser, config)
    assert isinstance(data, ImageFolder) and data.batch_size == 7 and data.image_shape == (1, 32, 32)
    with pytest.raises(Exception, match="batch_sise"):
        parser.parse_object({"data": {"class_path": "project.data.ImageFolder", "init_args": {"batch_sise": 7, **own}}})


def test_import_is_cheap() -> None:
    """What takes seconds to import, or is needed by one data set alone, is imported where it is used."""
    allowed = set(sys.stdlib_module_names) | {"torch", "lightning", "numpy", "project"}
    for path in Path(project.data.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # the top level only
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path
