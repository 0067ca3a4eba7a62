"""What the command line answers to mistakes: one sentence and status 2; a traceback and status 1 for bugs alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
        self.strength = strenght
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
        ("--data.augment+=own_parts.Aug", "own_parts.py, line 8, in __init__: NameError: name 'strenght' is not"),
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
