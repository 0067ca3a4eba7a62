"""What the command line answers to mistakes: one sentence and status 2; a traceback and status 1 for bugs alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from project.frame.errors import sentence
from project.frame.paths import Run
from project.frame.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, whose modules are forgotten after the test."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def refusal(done: tuple[int, str, str]) -> str:
    status, _, err = done
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


# -- which errors are the user's --------------------------------------------------------------------------------------

OWN = """
from lightning.pytorch import Callback
from project.data import BatchTransform

class Aug(BatchTransform):
    def __init__(self, strength: float = 1):
        super().__init__()
        self.strength = forte
    def forward(self, images, random):
        return images

class Tensors(BatchTransform):
    def forward(self, images, random):
        return images.brighter()

class Key(Callback):
    def on_train_start(self, *_):
        {}["missing"]

class Reason(Callback):
    def on_train_start(self, *_):
        raise ValueError("the moon is full: wait a night.")
"""


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--data.augment+=own_parts.Aug", "own_parts.py, line 8, in __init__: NameError: name 'forte' is not"),
        ("--data.augment+=own_parts.Tensors", "own_parts.py, line 14, in forward: AttributeError: 'Tensor' object"),
        ("--data.augment+=own_parts.Agu", "Did you mean 'Aug'?"),
        ("--data.augment=own_parts.Aug", "augment: Expected a list"),
        ('--data.augment+={"class_path": "project.data.RandomAfine"}', "did you mean RandomAffine?"),
        ("--trainer.callbacks+=own_parts.Key", "own_parts.py, line 18, in on_train_start: KeyError: 'missing'"),
        ("--model.net=own_broken.Net", "invalid syntax (own_broken.py, line 1)"),
        ("--trainer.devices=-2", "`devices` selected with `CPUAccelerator` should be an int > 0"),
        ("--model.optimizer=torch.optim.SparseAdam", "SparseAdam does not support dense gradients"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches is 0: choose 1 or more."),
        ("--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch is 0: choose 1 or more."),
    ],
)
def test_a_mistake_in_ones_own_class_or_in_lightnings_options(option, expected, command, digits, logs, here):
    (here / "own_parts.py").write_text(OWN)
    (here / "own_broken.py").write_text("class Net(:\n")
    args = [arg for arg in digits if "width" not in arg] if "net=" in option else digits
    if option.startswith("--trainer.devices"):
        args = [*args, "--trainer.accelerator=cpu"]
    assert expected in refusal(command("fit", *args, "--trainer.max_epochs=1", option))
    assert not list(logs.glob("*/version_*"))


def test_a_sentence_of_ones_own_is_the_answer(command, digits, logs, here):
    (here / "own_parts.py").write_text(OWN)
    answer = refusal(command("fit", *digits, "--trainer.callbacks+=own_parts.Reason"))
    assert answer == "the moon is full: wait a night."


def test_early_stopping_on_a_metric_that_nothing_logs(command, digits, logs):
    own = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/acc"]
    answer = refusal(command("fit", *digits, *own, "--trainer.max_epochs=1"))
    assert "`val/acc` which is not available" in answer and "`val/accuracy`" in answer


def test_an_argument_of_lightning_that_is_a_member_of_an_enum(command, digits, logs):
    own = ["--trainer.callbacks+=lightning.pytorch.callbacks.Timer", "--trainer.callbacks.duration=01:00:00:00"]
    assert command("fit", *digits, *own, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")[0] == 0
    saved = yaml.safe_load(Run.find(logs / "digits").config.read_text(encoding="utf-8"))
    assert saved["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


def test_a_bug_keeps_its_traceback_and_says_how_to_report_it(command, digits, logs, monkeypatch):
    monkeypatch.setattr("project.frame.cli.check_checkpoint", None)
    status, _, err = command("fit", *digits)
    assert status == 1
    assert (
        err.startswith("Traceback")
        and "'NoneType' object is not callable" in err
        and "Please report it" in err.splitlines()[-2]
    )


def test_too_little_memory_and_an_error_of_a_loaders_process():
    try:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    except RuntimeError as error:
        assert "lower data.batch_size" in str(sentence(error))
    text = (
        'Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "a"\n'
    )
    assert sentence(ValueError(f"{text}ValueError: cat.png is no image: remove it.\n")) == (
        "cat.png is no image: remove it."
    )


# -- configuration files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"data:\n  init_args:\n    batch_size: 64\n    batch_size: 32\n", "batch_size stands in line 3 and in line 4"),
        (b"trainer: {a: [{b: 1, b: 2}]}", "b stands in line 1 and in line 1"),
        (b"model:\n\tnet: 3\n", "mine.yaml, line 2, is no YAML (found character that cannot start any token): indent"),
        (b"trainer: [1, 2\n", "mine.yaml, line 2, is no YAML"),
        (b"a: &a [*a]\n", "mine.yaml, line 1, is no YAML"),
        (b"---\na: 1\n---\nb: 2\n", "mine.yaml, line 3, is no YAML"),
        (b"# \xff\n", "mine.yaml is not UTF-8 (invalid start byte at byte 2)"),
        (b"- a\n- b\n", "mine.yaml holds no keys"),
        (b"hello", "mine.yaml holds no keys"),
    ],
)
def test_a_fault_in_a_configuration_is_told_with_its_file(text, expected, command, digits, here):
    (here / "mine.yaml").write_bytes(text)
    assert expected in refusal(command("fit", *digits, "--config=mine.yaml"))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("# trainer:\n#   max_epochs: 3\n", {}),
        ("\ufefftrainer: {max_epochs: 3}", {"trainer": {"max_epochs": 3}}),
        ("trainer:\n  # max_epochs: 3\n", {"trainer": {}}),
        ("data:\n  init_args:\n    # seed: 3\n", {"data": {"init_args": {}}}),
        ("model: {loss: null}\nbase: &b {a: 1}\nc:\n  <<: *b\n  a: 2e-3", None),
    ],
)
def test_a_fragment_may_be_commented_out(text, values, tmp_path):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    expected = yaml.safe_load(text) if values is None else values
    assert yaml.safe_load(read_yaml(tmp_path / "mine.yaml")) == expected


def test_fits_with_commented_fragments(command, digits, logs, here):
    for number, text in enumerate(("", "trainer:\n  # max_epochs: 3\n", "data:\n  init_args:\n    # seed: 3\n")):
        (here / f"{number}.yaml").write_text(text)
    fragments = [f"--config={number}.yaml" for number in range(3)]
    status, _, err = command("fit", *digits, *fragments, "--trainer.fast_dev_run=1")
    assert status == 0, err


@pytest.mark.slow
def test_a_configuration_is_utf_8_whatever_the_locale(digits, here):
    (here / "mine.yaml").write_text("trainer: {experiment: cats}  # 猫, gemüse\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PROJECT_LOGS_DIR": "logs", "OMP_NUM_THREADS": "1"}
    for options in (["fit", *digits, "--config=mine.yaml", "--trainer.max_epochs=1"], ["test", "--run=logs/cats"]):
        command = [sys.executable, "-m", "project", *options]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == 0 and b"Error" not in done.stderr, done.stderr


# -- data sets of one's own -------------------------------------------------------------------------------------------

DATA = """
import torch
from project.data import BatchTransform, ImageDataModule

class Good(ImageDataModule):
    class_names, image_shape, mean, std = ("a", "b"), (1, 8, 8), (0.5,), (0.29,)
    shape, num_labels, kind = (40, 1, 8, 8), 2, torch.int64
    def load(self, train):
        return torch.zeros(self.shape, dtype=torch.uint8), (torch.arange(40) % self.num_labels).to(self.kind)

class Float(Good):
    def load(self, train):
        return torch.rand(self.shape), torch.arange(40) % 2

class Numpy(Good):
    def load(self, train):
        return tuple(each.numpy() for each in super().load(train))

class NoNames(ImageDataModule):
    image_shape, mean, std = (1, 8, 8), (0.5,), (0.29,)

class NoLoad(ImageDataModule):
    class_names, image_shape, mean, std = ("a", "b"), (1, 8, 8), (0.5,), (0.29,)

class MoreLabels(Good):
    num_labels = 5

class Int32(Good):
    kind = torch.int32

class Colour(Good):
    shape = (40, 3, 8, 8)

class Flat(Good):
    shape = (40, 64)

class Fewer(Good):
    shape = (41, 1, 8, 8)

class Forgets(BatchTransform):
    def forward(self, images, random):
        images * 2
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Float", "the images are a Tensor of torch.float32 [40, 1, 8, 8], but a tensor [N, C, H, W] of torch.uint8"),
        ("Numpy", "the images are a ndarray of uint8 [40, 1, 8, 8], but a tensor"),
        ("NoNames", "NoNames has no class_names: set it in the class or in its __init__."),
        ("NoLoad", "NoLoad.load gives a NoneType: let it return images and labels."),
        ("MoreLabels", "MoreLabels has labels 0 to 4, but 2 class_names: the labels must be 0 to 1."),
        ("Int32", "the labels are a Tensor of torch.int32 [40], but a tensor [40] of torch.int64 is needed"),
        ("Colour", "Colour has images (3, 8, 8), but its image_shape is (1, 8, 8)"),
        ("Flat", "the images are a Tensor of torch.uint8 [40, 64], but a tensor [N, C, H, W]"),
        ("Fewer", "the labels are a Tensor of torch.int64 [40], but a tensor [41] of torch.int64 is needed"),
        ("Good", "augment has Forgets, which makes NoneType of images [16, 1, 8, 8]: keep their shape."),
    ],
)
def test_a_mistake_in_a_data_set_of_ones_own(name, expected, command, logs, here):
    (here / "own_data.py").write_text(DATA)
    options = [f"--data=own_data.{name}", "--data.batch_size=16", "--model.net=project.models.SmallInception"]
    wrong = ["--data.augment+=own_data.Forgets"] if name == "Good" else []
    answer = refusal(command("fit", *options, *wrong, "--trainer.max_epochs=1", "--trainer.observe=false"))
    assert expected in answer
    assert not list(logs.glob("*/version_*"))


# -- the folder of a failed run, and a checkpoint alone ---------------------------------------------------------------


def test_a_run_that_failed_without_a_checkpoint_is_not_the_newest(command, digits, logs, here):
    options = [*digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false"]
    assert command("fit", *options)[0] == 0
    own = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/acc"]
    refusal(command("fit", *options, *own))
    assert [folder.name for folder in (logs / "digits").iterdir()] == ["version_0"]
    # One that has a checkpoint can be resumed, so it stays.
    (here / "own_late.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Late(Callback):\n"
        "    def on_train_epoch_start(self, trainer, module):\n"
        "        assert trainer.current_epoch < 1\n"
    )
    answer = refusal(command("fit", *options, "--trainer.max_epochs=2", "--trainer.callbacks+=own_late.Late"))
    assert "own_late.py, line 4, in on_train_epoch_start: AssertionError" in answer
    assert Run.find(logs / "digits").folder.name == "version_1"


def test_a_checkpoint_alone_brings_its_configuration(command, digits, logs, here):
    assert command("fit", *digits, "--trainer.max_epochs=1")[0] == 0
    run = Run.find(logs / "digits")
    summary = run.summary.read_text(encoding="utf-8")
    status, out, err = command("test", "--ckpt_path", str(run.best_checkpoint))
    assert status == 0 and "test/accuracy" in out, err
    assert run.summary.read_text(encoding="utf-8") == summary
    assert command("validate", f"--ckpt_path={run.last_checkpoint}")[0] == 0
    moved = here / "a" / "b.ckpt"
    moved.parent.mkdir()
    run.best_checkpoint.rename(moved)
    assert "no config.yaml belongs to it: give --config or --run" in refusal(command("test", f"--ckpt_path={moved}"))
    expected = command("test", f"--run={run.folder}", "--ckpt_path", str(moved))
    assert expected[0] == 0 and command("test", "--ckpt_path", str(moved), f"--run={run.folder}") == expected
    assert command("test", "-c", str(run.config), "--ckpt_path", str(moved)) == expected


def test_a_run_is_found_behind_a_configuration_before_the_verb(command, digits, logs, here):
    assert command("fit", *digits, "--trainer.max_epochs=1")[0] == 0
    (here / "whole.yaml").write_text("fit: {trainer: {max_epochs: 2}}")
    status, _, err = command("--config", "whole.yaml", "fit", "--resume", str(logs / "digits"))
    assert status == 0 and [run.name for run in (logs / "digits").iterdir()] == ["version_0"], err


def test_a_result_that_cannot_be_written_is_refused_before_the_work(command, digits, logs, here):
    (here / "folder").mkdir()
    (here / "file").touch()
    Image.new("L", (8, 8)).save(here / "x.png")
    assert command("fit", *digits, "--trainer.max_epochs=1")[0] == 0
    predict = ("predict", "--run", str(logs / "digits"), "--images", "x.png", "--output")
    assert "it is a folder: give --output FILE" in refusal(command(*predict, "folder"))
    assert "file is no folder: give --output FILE" in refusal(command(*predict, "file/x.csv"))
    assert command(*predict, "new/x.csv")[0] == 0
