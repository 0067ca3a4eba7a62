"""The best and the last checkpoint, alone and beside a ModelCheckpoint of the user's own."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import BestAndLast
from project.callbacks.checkpoint import forget_best
from project.data import Digits
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.models import Classifier, SmallInception


def weights_of(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)["state_dict"]


def same(first: str | Path, second: str | Path) -> bool:
    one, two = weights_of(first), weights_of(second)
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def fit(callback: ModelCheckpoint, logs: Path, epochs: int = 4, **options: object) -> tuple[Trainer, Run]:
    seed_everything(0, verbose=False)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9)  # noqa: E731
    module = Classifier(SmallInception(10, (1, 8, 8), width=0.125), 10, (1, 8, 8), optimizer=optimizer)
    trainer = Trainer(
        accelerator="cpu",
        experiment="own",
        logs_dir=str(logs),
        callbacks=[callback],
        enable_progress_bar=False,
        observe=False,
        max_epochs=epochs,
        limit_train_batches=4,
    )
    trainer.fit(module, datamodule=Digits(batch_size=64, seed=0), **options)  # type: ignore[arg-type]
    assert trainer.run is not None
    return trainer, trainer.run


OWN = {
    "least loss, top 2": {"monitor": "val/loss", "mode": "min", "save_top_k": 2, "filename": "{epoch}"},
    "best accuracy, save_last": {"monitor": "val/accuracy", "mode": "max", "save_last": True},
    "the worst loss": {"monitor": "val/loss", "mode": "max", "filename": "worst-{step}", "save_top_k": 1},
    "all, every second epoch": {"monitor": "val/loss", "save_top_k": -1, "every_n_epochs": 2},
    "a metric of training, named best": {
        "monitor": "train/loss",
        "filename": "best",
        "save_on_train_epoch_end": True,
    },
}


@pytest.mark.parametrize("name", OWN)
def test_what_ones_own_callback_names_as_best_is_tested_and_found(name, logs):
    own = ModelCheckpoint(**OWN[name])
    trainer, run = fit(own, logs)
    assert Path(own.best_model_path).is_file() and same(run.best_checkpoint, own.best_model_path)
    assert run.weights() == run.best_checkpoint
    last = torch.load(run.last_checkpoint, weights_only=True)
    assert last["epoch"] == 3
    if name == "the worst loss":
        assert not same(run.best_checkpoint, run.last_checkpoint)
    summary = json.loads(run.summary.read_text())
    assert summary["best_checkpoint"] == "best.ckpt" and summary["monitor"] == own.monitor
    assert summary["best_score"] == pytest.approx(own.best_model_score.item())
    metrics = trainer.test(trainer.lightning_module, datamodule=Digits(), ckpt_path=own.best_model_path, verbose=False)
    assert metrics[0]["test/loss"] == pytest.approx(summary["test/loss"], rel=1e-5)


def test_a_resumed_run_goes_on_to_follow(logs):
    own = ModelCheckpoint(monitor="val/loss", filename="{epoch}")
    _, run = fit(own, logs, epochs=2)
    run.config.touch()
    before = own.best_model_score
    own = ModelCheckpoint(monitor="val/loss", filename="{epoch}")
    _, again = fit(own, logs, epochs=5, resume=str(run.folder))
    assert again == run and own.best_model_score < before
    assert same(run.best_checkpoint, own.best_model_path)


def test_without_a_monitor_of_its_own_a_callback_is_not_followed(logs):
    own = ModelCheckpoint(save_top_k=-1, filename="{epoch}")
    trainer, run = fit(own, logs, epochs=2)
    best = next(c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast))
    assert best.monitor == "val/accuracy" and best.followed is None and run.best_checkpoint.is_file()
    assert len(list(run.checkpoints.iterdir())) == 4


def test_what_is_forgotten_is_forgotten_by_the_followed_callback_too(logs):
    class ForgetAfter(BestAndLast):
        """As a compression does when a level begins."""

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                forget_best(trainer)

    own = ModelCheckpoint(monitor="val/loss", mode="max", filename="{epoch}")  # at its best in the first epoch
    seed_everything(0, verbose=False)
    module = Classifier(SmallInception(10, (1, 8, 8), width=0.125), 10, (1, 8, 8))
    trainer = Trainer(
        accelerator="cpu",
        logs_dir=str(logs),
        callbacks=[ForgetAfter(), own],
        enable_progress_bar=False,
        observe=False,
        max_epochs=3,
        limit_train_batches=4,
        test_after_fit=False,
    )
    trainer.fit(module, datamodule=Digits(batch_size=64, seed=0))
    assert trainer.run is not None
    assert Path(own.best_model_path).name == "epoch=2.ckpt"
    assert same(trainer.run.best_checkpoint, own.best_model_path)
    assert sorted(path.name for path in trainer.run.checkpoints.iterdir()) == ["best.ckpt", "epoch=2.ckpt", "last.ckpt"]


@pytest.mark.parametrize("own", [None, {"monitor": "val/loss", "mode": "max", "filename": "{epoch}"}])
def test_a_new_run_from_another_ones_checkpoint_has_a_best_epoch_of_its_own(own, logs):
    def callback() -> ModelCheckpoint:
        if own:
            return ModelCheckpoint(**own)
        default = BestAndLast(monitor="val/loss")
        default.mode = "max"  # as if the other run had been better
        return default

    _, first = fit(callback(), logs, epochs=2)
    _, second = fit(callback(), logs, epochs=3, ckpt_path=str(first.last_checkpoint))
    assert second != first and second.best_checkpoint.is_file()
    assert same(second.best_checkpoint, second.last_checkpoint)  # the only epoch of this run
    summary = json.loads(second.summary.read_text())
    assert summary["best_score"] == pytest.approx(summary["val/loss"])


def test_the_best_of_a_moved_run_is_still_to_be_beaten(logs, tmp_path):
    own = {"monitor": "val/loss", "mode": "max", "filename": "{epoch}"}  # at its best in the first epoch
    _, run = fit(ModelCheckpoint(**own), logs, epochs=2)
    run.config.touch()
    moved = Run(tmp_path / "moved")
    shutil.move(run.folder, moved.folder)
    callback = ModelCheckpoint(**own)
    fit(callback, logs, epochs=3, resume=str(moved.folder))
    assert callback.best_model_path == str(moved.checkpoints / "epoch=0.ckpt")
    assert same(moved.best_checkpoint, callback.best_model_path)


@pytest.mark.parametrize("options", [{"filename": "last"}, {"filename": "best", "save_top_k": 2}])
def test_a_filename_that_the_run_itself_writes_is_refused(options, logs):
    with pytest.raises(ValueError, match="choose another filename"):
        fit(ModelCheckpoint(monitor="val/loss", **options), logs, epochs=1)


def test_a_folder_of_ones_own_is_kept(logs, tmp_path):
    own = ModelCheckpoint(dirpath=tmp_path / "mine", monitor="val/loss", filename="{epoch}")
    _, run = fit(own, logs, epochs=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["epoch=0.ckpt"]
    assert same(run.best_checkpoint, own.best_model_path)


@pytest.mark.slow
def test_every_verb_takes_the_best_file_from_a_folder_with_a_space(command, digits, logs, tmp_path):
    """``last.ckpt`` alone is found too: `predict` goes by what `test` goes by."""
    from PIL import Image

    init_args = {"monitor": "val/loss", "mode": "max", "save_top_k": 2, "filename": "{epoch}"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": init_args}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    options = ["--config", str(tmp_path / "own.yaml"), "--trainer.max_epochs=2", "--trainer.limit_train_batches=4"]
    options += ["--trainer.experiment=my run"]
    status, out, err = command("fit", *digits, *options)
    assert status == 0, err
    run = Run.find(logs / "my run")
    assert f"project predict --run '{run.folder}' --images" in out
    tested = json.loads(run.summary.read_text())
    assert command("test", "--run", str(run.folder))[0] == 0
    assert json.loads(run.summary.read_text()) == tested
    Image.new("L", (8, 8), 90).save(tmp_path / "photo.png")
    predict = ["predict", "--run", str(run.folder), "--images", str(tmp_path / "photo.png")]
    assert command(*predict)[0] == 0
    of_best = run.predictions.read_text()
    run.best_checkpoint.unlink()
    status, _, err = command(*predict)
    assert status == 0, err
    assert run.predictions.read_text() != of_best


def test_a_run_without_checkpoints_ends_with_commands_that_work(command, digits, logs):
    options = ["--trainer.enable_checkpointing=false", "--trainer.logger=false", "--trainer.max_epochs=1"]
    status, out, err = command("fit", *digits, *options)
    assert status == 0, err
    assert "project test" not in out and "tensorboard" not in out


@pytest.mark.parametrize("place", ["{folder}/../../mine.ckpt", "/elsewhere/mine.ckpt"])
def test_a_checkpoint_cannot_make_the_callback_delete_files_elsewhere(place, tmp_path):
    callback = BestAndLast()
    callback.dirpath = str(tmp_path / "run/checkpoints")
    path = place.format(folder=callback.dirpath)
    state = {"dirpath": callback.dirpath, "best_model_path": "", "kth_best_model_path": path, "last_model_path": ""}
    checkpoint = {"callbacks": {callback.state_key: {**state, "best_k_models": {path: torch.tensor(0.1)}}}}
    callback.on_load_checkpoint(SimpleNamespace(checkpoint_callbacks=[callback]), None, checkpoint)
    assert checkpoint["callbacks"][callback.state_key] == {}
