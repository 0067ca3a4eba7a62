"""``trainer.kernels`` switches the C kernels for a whole run; environment.json says whether they ran."""

import json

import pytest
import torch
from helpers.slow import fast
from lightning.pytorch import Callback

from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.models.kernels.build import describe, library, switched

TWO_BATCHES = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


class Note(Callback):
    """Notes at each stage whether there are kernels."""

    def __init__(self):
        self.noted = {}

    def on_train_batch_end(self, *_):
        self.noted["fit"] = library(torch.float32) is not None

    def on_test_batch_end(self, *_):
        self.noted["test"] = library(torch.float32) is not None


@pytest.fixture(autouse=True)
def same_afterwards():
    """Whatever a run chooses, the process is as before when the run has ended."""
    before = library(torch.float32) is not None
    yield
    assert (library(torch.float32) is not None) == before


def kernels_of(run: Run) -> dict:
    return json.loads(run.environment.read_text())["kernels"]


@pytest.mark.parametrize(
    "off", fast([["--trainer.kernels=off"], "false", ["--trainer.kernels", "off"], "off", "'off'"], 2)
)
def test_off_on_the_command_line_and_in_yaml(off, command, digits, logs, tmp_path, kernels):
    if isinstance(off, str):
        (tmp_path / "off.yaml").write_text(f"trainer: {{kernels: {off}}}")
        off = ["--config", str(tmp_path / "off.yaml")]
    status, _, err = command("fit", *digits, *TWO_BATCHES, *off)
    assert status == 0, err
    assert kernels_of(Run.find(logs / "digits")) == {"on": False, "built": [], "used": []}


def test_auto_uses_them_and_says_which(command, digits, logs, kernels):
    status, _, err = command("fit", *digits, *TWO_BATCHES)
    assert status == 0, err
    found = kernels_of(Run.find(logs / "digits"))
    assert found["on"] and "float32" in found["built"]  # other tests of this process may have used further types
    assert {"first_layer", "batch_norm_relu"} <= set(found["used"])


@pytest.mark.slow
def test_the_choice_of_a_run_holds_when_it_is_repeated(command, digits, logs, tmp_path, kernels):
    (tmp_path / "off.yaml").write_text("trainer: {kernels: off}")
    assert command("fit", *digits, *TWO_BATCHES, f"--config={tmp_path / 'off.yaml'}")[0] == 0
    assert command("fit", "--config", str(Run.find(logs / "digits").config))[0] == 0
    assert not kernels_of(Run.find(logs / "digits"))["on"]


def test_a_wrong_value_is_refused(command, digits):
    status, _, err = command("fit", *digits, "--trainer.kernels=of")
    assert status == 2 and "trainer.kernels" in err and "'auto', 'off'" in err and err.count("\n") == 1


def test_the_environment_variable_wins(command, digits, logs, monkeypatch):
    monkeypatch.setenv("PROJECT_KERNELS", "0")
    library.cache_clear()
    try:
        status, _, err = command("fit", *digits, *TWO_BATCHES, "--trainer.kernels=auto")
    finally:
        monkeypatch.delenv("PROJECT_KERNELS")
        library.cache_clear()
    assert status == 0, err
    assert not kernels_of(Run.find(logs / "digits"))["on"]


def test_trainers_of_one_process_choose_for_themselves(digits, logs, kernels):
    """Both are there before one runs; fit and its test, one after the other and again."""
    from project.frame.cli import CLI

    built = [CLI([*digits, *TWO_BATCHES, f"--trainer.kernels={choice}"], run=False) for choice in ("off", "auto")]
    for cli, expected in ((built[1], True), (built[0], False), (built[1], True)):
        note = Note()
        cli.trainer.callbacks.insert(0, note)
        cli.trainer.fit_loop.max_epochs = cli.trainer.current_epoch + 1
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        assert note.noted == {"fit": expected, "test": expected}
        assert kernels_of(cli.trainer.run)["on"] == expected
        assert library(torch.float32) is not None
        cli.trainer.callbacks.remove(note)


def test_an_error_in_a_run_gives_the_process_back_as_it_was(digits, logs, kernels):
    from project.frame.cli import CLI

    class Fail(Callback):
        def on_train_start(self, *_):
            assert library(torch.float32) is None
            raise ValueError("as asked")

    cli = CLI([*digits, "--trainer.kernels=off"], run=False)
    cli.trainer.callbacks.append(Fail())
    with pytest.raises(ValueError, match="as asked"):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert library(torch.float32) is not None


def test_without_the_room_of_kernels_the_argument_does_nothing(digits, logs, monkeypatch):
    monkeypatch.setattr("project.frame.trainer.optional", lambda name: None)
    with Trainer(logger=False, observe=False, kernels="off").own_kernels():
        assert True


def test_nested_choices_end_one_by_one(kernels):
    with switched(False):
        with switched(True):
            assert describe()["on"] and library(torch.float32) is not None
        assert not describe()["on"] and library(torch.float32) is None
    assert describe()["on"]
