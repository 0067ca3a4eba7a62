"""The main job, as a user types it: fit, resume, validate, test, predict; and what a mistake is answered with."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from project.frame.paths import Run

ROOT = Path(__file__).resolve().parents[2]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["state_dict"]


def test_fit_leaves_a_whole_run_folder_and_says_what_next(command, digits, logs):
    status, out, err = command("fit", *digits, "--trainer.max_epochs=2")
    assert status == 0, err
    run = Run.find(logs / "digits")
    assert run.folder == logs / "digits" / "version_0"
    for path in (run.config, run.environment, run.metrics, run.summary, run.best_checkpoint, run.last_checkpoint):
        assert path.is_file(), path
    assert list(run.folder.glob("events.out.tfevents.*"))
    summary = json.loads(run.summary.read_text())
    assert 0 < summary["test/accuracy"] <= 1
    assert summary["train_seconds"] > 0 and summary["images_per_second"] > 0
    assert f"test accuracy  {100 * summary['test/accuracy']:.2f} %" in out
    for line in (
        f"project test --run {run.folder}",
        f"project predict --run {run.folder} --images",
        "tensorboard --logdir",
    ):
        assert line in out
    rows = read_csv(run.metrics)
    assert [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]


def test_fit_without_test_and_without_loggers_still_fills_the_folder(command, digits, logs):
    options = ["--trainer.test_after_fit=false", "--trainer.logger=false", "--trainer.max_epochs=1"]
    status, _, err = command("fit", *digits, *options, "--trainer.experiment=plain")
    assert status == 0, err
    run = Run.find(logs / "plain")
    assert run.metrics.is_file() and run.config.is_file() and run.last_checkpoint.is_file()
    assert "test/accuracy" not in json.loads(run.summary.read_text())
    assert not list(run.folder.glob("events*"))


def test_a_resumed_run_ends_in_the_bits_of_one_never_stopped(command, digits, logs):
    whole = ["--trainer.max_epochs=4", "--trainer.experiment=whole", "--trainer.test_after_fit=false"]
    assert command("fit", *digits, *whole)[0] == 0
    # The schedule's length belongs to the run, so the first half is stopped early rather than made shorter.
    half = ["--trainer.max_epochs=4", "--trainer.experiment=half", "--trainer.test_after_fit=false"]
    stop = ["--trainer.callbacks+=helpers.stop_after.StopAfter", "--trainer.callbacks.epochs=2"]
    assert command("fit", *digits, *half, *stop)[0] == 0
    first = Run.find(logs / "half")
    assert torch.load(first.last_checkpoint, weights_only=True)["epoch"] == 1
    status, _, err = command("fit", "--resume", str(logs / "half"), "--trainer.callbacks=null")
    assert status == 0, err
    assert [folder.name for folder in (logs / "half").iterdir()] == ["version_0"]
    resumed, never_stopped = weights(first.last_checkpoint), weights(Run.find(logs / "whole").last_checkpoint)
    assert resumed.keys() == never_stopped.keys()
    for key, value in never_stopped.items():
        assert torch.equal(resumed[key], value), key
    epochs = [row["epoch"] for row in read_csv(first.metrics) if row.get("val/loss")]
    assert epochs == ["0", "1", "2", "3"]


def test_a_run_that_was_killed_before_its_first_checkpoint_logs_no_row_twice(command, digits, logs):
    options = ["--trainer.max_epochs=2", "--trainer.test_after_fit=false"]
    assert command("fit", *digits, *options)[0] == 0
    run = Run.find(logs / "digits")
    rows = [row["step"] for row in read_csv(run.metrics)]
    shutil.rmtree(run.checkpoints)
    assert command("fit", "--resume", str(run.folder))[0] == 0
    assert [row["step"] for row in read_csv(run.metrics)] == rows


def test_test_and_validate_of_a_run_repeat_its_own_figures(command, digits, logs):
    assert command("fit", *digits, "--trainer.max_epochs=2")[0] == 0
    run = Run.find(logs / "digits")
    before = json.loads(run.summary.read_text())
    status, _, err = command("test", "--run", str(logs / "digits"))
    assert status == 0, err
    assert json.loads(run.summary.read_text()) == before
    status, out, err = command("validate", f"--run={run.folder}")
    assert status == 0, err
    printed = re.search(r"val/accuracy\D+([\d.]+)", out)
    assert printed is not None and float(printed[1]) == pytest.approx(before["best_score"], abs=1e-6), out


def test_predict_classifies_image_files_without_the_data_set(command, digits, logs, tmp_path):
    from PIL import Image
    from sklearn.datasets import load_digits

    assert command("fit", *digits, "--trainer.max_epochs=8", "--model.net.width=0.5")[0] == 0
    images = tmp_path / "images" / "more"
    images.mkdir(parents=True)
    data = load_digits()
    for index in range(20):
        pixels = (data.images[index] * 15.9).astype("uint8")
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.NEAREST).convert("RGB").save(
            images / f"{index:02}.png"
        )
    config = Run.find(logs / "digits").config
    config.write_text(config.read_text().replace("project.data.Digits", "project.data.MNIST"))  # its data are not here
    status, _, err = command("predict", "--run", str(logs / "digits"), "--images", str(images.parent))
    assert status == 0, err
    rows = read_csv(Run.find(logs / "digits").predictions)
    assert [Path(row["file"]).name for row in rows] == [f"{index:02}.png" for index in range(20)]
    for row in rows:
        probabilities = {name: float(row[name]) for name in map(str, range(10))}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert row["class"] == max(probabilities, key=probabilities.__getitem__)
    assert sum(row["class"] == str(data.target[index]) for index, row in enumerate(rows)) >= 15
    one = tmp_path / "one.csv"
    status, *_ = command("predict", "--run", str(logs), "--images", str(images / "03.png"), "--output", str(one))
    assert status == 2  # logs/ is neither a run nor an experiment
    args = ("--run", str(logs / "digits"), "--images", str(images / "03.png"), "--output", str(one))
    assert command("predict", *args)[0] == 0
    assert len(one.read_text().splitlines()) == 2


def test_a_fragment_appends_its_callback(command, digits, logs, tmp_path):
    for name in ("EMA", "WeightHistograms"):
        fragment = {"trainer": {"callbacks+": [{"class_path": f"project.callbacks.{name}"}]}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fragment))
    fragments = [f"--config={tmp_path / name}.yaml" for name in ("EMA", "WeightHistograms")]
    status, _, err = command("fit", *digits, *fragments, "--trainer.max_epochs=1")
    assert status == 0, err
    saved = yaml.safe_load(Run.find(logs / "digits").config.read_text())
    kinds = [callback["class_path"].split(".")[-1] for callback in saved["trainer"]["callbacks"]]
    assert kinds == ["EMA", "WeightHistograms"]


def test_a_net_of_ones_own_needs_no_image_shape(command, digits, logs):
    """Links to arguments that a net lacks are left out: a plain ``nn.Module`` will do."""
    args = [digit for digit in digits if "width" not in digit]
    status, _, err = command("fit", *args, "--model.net=helpers.own_net.OwnNet", "--trainer.max_epochs=1")
    assert status == 0, err


MISTAKES = {
    "unknown key in a group": (["--trainer.max_epoch=2"], "max_epochs"),
    "unknown key of a net": (["--model.net.widht=2"], "width"),
    "unknown key of the data": (["--data.batchsize=2"], "batch_size"),
    "unknown class": (["--model.net=project.models.SmallIncepton"], "SmallInception"),
    "wrong type": (["--data.batch_size=many"], "batch_size"),
    "missing data": (["--data=project.data.FashionMNIST", "--data.data_dir=nowhere"], "dataset-fashion-mnist"),
    "missing image folder": (["--data=project.data.ImageFolder", "--data.root=nowhere"], "nowhere"),
    "image size that the net cannot take": (["--model.net=project.models.InceptionV3"], "75 pixels"),
    "batch larger than the data": (["--data.batch_size=5000"], "batch_size is 5000"),
    "negative dropout": (["--model.net.fc_dropout=-0.5"], "fc_dropout is -0.5"),
    "negative penalty": (["--model.penalties=project.losses.Penalties", "--model.penalties.l1_fc=-1"], "l1_fc is -1"),
    "negative validation share": (["--data.val_fraction=-0.1"], "val_fraction is -0.1"),
    "negative learning rate": (["--model.optimizer.lr=-1"], "learning rate"),
    "NaN loss": (["--model.optimizer.lr=1e30", "--trainer.max_epochs=2"], "step 1"),
    "no such configuration": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "not a checkpoint": (["--ckpt_path=LICENSE"], "not a checkpoint"),
    "no such checkpoint": (["--ckpt_path=nowhere.ckpt"], "no such file"),
    "no such run": (["--resume=nowhere"], "no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence(name, command, digits, logs, tmp_path, monkeypatch):
    options, expected = MISTAKES[name]
    (tmp_path / "LICENSE").write_text("not a checkpoint")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("project.frame.paths.Paths.system_datasets", tmp_path / "none")
    args = [arg for arg in digits if "width" not in arg] if "--model.net=" in options[0] else digits
    status, _, err = command("fit", *args, *options)
    lines = err.strip().splitlines()
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert expected in lines[0] and len(lines[0]) < 400
    if name != "NaN loss":
        assert not list(logs.glob("*/version_*")), "a run that never began leaves no folder"


@pytest.mark.parametrize(
    "key", ["trainer: {max_epoch: 3}", "data: {init_args: {batchsize: 3}}", "modle: {compile: true}"]
)
def test_the_same_typo_in_yaml_is_refused(key, command, digits, logs, tmp_path):
    (tmp_path / "typo.yaml").write_text(key)
    status, _, err = command("fit", *digits, f"--config={tmp_path / 'typo.yaml'}")
    assert status == 2
    right = {"trainer": "max_epochs", "data": "batch_size", "modle": "model"}[key.split(":")[0]]
    assert "Did you mean" in err and right in err.split("Did you mean")[1], err


def test_a_wrong_value_deep_in_yaml_is_named_with_what_it_could_be(command, digits, logs, tmp_path):
    pruner = {"class_path": "project.compression.Pruner", "init_args": {"budget": "effectiv"}}
    callback = {"class_path": "project.callbacks.IterativeMagnitudePruning", "init_args": {"pruner": pruner}}
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    status, _, err = command("fit", *digits, f"--config={tmp_path / 'typo.yaml'}")
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert "trainer.callbacks: " in err and "budget: " in err and "'effective'" in err and "Got value: effectiv" in err
    assert "Errors:" not in err and len(err) < 400


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_verb_without_weights_refuses(verb, command, digits):
    status, _, err = command(verb, *digits)
    assert status == 2 and "--run" in err and len(err.strip().splitlines()) == 1


def test_another_nets_checkpoint_is_refused(command, digits, logs):
    assert command("fit", *digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")[0] == 0
    path = Run.find(logs / "digits").best_checkpoint
    status, _, err = command("test", *digits, "--model.net.width=0.5", f"--ckpt_path={path}")
    assert status == 2 and "belongs to another net" in err and "Traceback" not in err


def test_a_wrong_value_deep_in_a_fragment_is_named(command, digits):
    """The sentence of an object within a callback within a list, not jsonargparse's account of what it tried."""
    fragment = ["--config", str(ROOT / "configs/compression/unit_pruning.yaml")]
    status, _, err = command("fit", *digits, *fragment, "--trainer.callbacks.pruner.init_args.round_to=0")
    assert status == 2
    assert "round_to is 0" in err and "Union" not in err and err.count("\n") == 1


def test_a_configuration_before_the_verb_gives_the_same_run(command, tmp_path):
    """Then the options of all verbs are known; behind a verb only its own are."""
    whole = tmp_path / "whole.yaml"
    whole.write_text(yaml.safe_dump({"fit": yaml.safe_load((ROOT / "configs/digits.yaml").read_text())}))
    one = command("fit", "--config", ROOT / "configs/digits.yaml", "--print_config")
    assert command("--config", whole, "fit", "--print_config") == one and one[0] == 0 and "max_epochs: " in one[1]
