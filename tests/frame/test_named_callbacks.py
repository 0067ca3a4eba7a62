"""``--trainer.callbacks.CLASS.argument`` reaches the one callback of a class, wherever it stands in the list."""

import sys
from pathlib import Path

import pytest
import yaml

from project.frame.paths import Run

ROOT = Path(__file__).resolve().parents[2]
FRAGMENTS = ["--config=my_keeper.yaml", f"--config={ROOT / 'configs/callbacks/ema.yaml'}", "--config=my_own.yaml"]
OWN = """
from lightning.pytorch import Callback


class Box:
    def __init__(self, bits: int = 4) -> None:
        self.bits = bits


class Keeper(Callback):
    def __init__(self, box: Box, latency: bool = True, epochs: int = 1) -> None:
        self.box = box


class quiet_one(Callback):
    def __init__(self, words: int = 1, sizes: list[int] | None = None) -> None:
        self.words = words
"""
KEEPER = """
trainer:
  callbacks+:
    - class_path: my_callbacks_of_words.Keeper
      init_args:
        box: {class_path: my_callbacks_of_words.Box, init_args: {bits: 2}}
"""


@pytest.fixture
def parse(command, digits, tmp_path, monkeypatch):
    """``parse(…)``: exit status, arguments of each callback by its class, standard error."""
    (tmp_path / "my_callbacks_of_words.py").write_text(OWN)
    (tmp_path / "my_own.yaml").write_text("trainer: {callbacks+: [{class_path: my_callbacks_of_words.quiet_one}]}")
    (tmp_path / "my_keeper.yaml").write_text(KEEPER)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        status, out, err = command("fit", *digits, *args, "--print_config")
        callbacks = yaml.safe_load(out)["trainer"]["callbacks"] if status == 0 else []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        return status, {item["class_path"].split(".")[-1]: item["init_args"] for item in callbacks}, err

    yield run
    sys.modules.pop("my_callbacks_of_words", None)


@pytest.mark.parametrize(
    ("options", "name", "path", "expected"),
    [
        (["--trainer.callbacks.Keeper.latency=false"], "Keeper", ["latency"], False),
        (["--trainer.callbacks.Keeper.latency", "false"], "Keeper", ["latency"], False),
        (["--trainer.callbacks.Keeper.init_args.latency=false"], "Keeper", ["latency"], False),
        (["--trainer.callbacks.Keeper.box.bits=3"], "Keeper", ["box", "init_args", "bits"], 3),
        (["--trainer.callbacks.EMA.decay", "0.5"], "EMA", ["decay"], 0.5),
        (["--trainer.callbacks.quiet_one.words=7"], "quiet_one", ["words"], 7),
        (["--trainer.callbacks.quiet_one.sizes=[1, 2]"], "quiet_one", ["sizes"], [1, 2]),
        (["--trainer.callbacks.words=7"], "quiet_one", ["words"], 7),
    ],
)
def test_it_reaches_one_callback_and_leaves_the_others(options, name, path, expected, parse):
    before = parse(*FRAGMENTS)[1]
    status, callbacks, err = parse(*FRAGMENTS, *options)
    assert status == 0, err
    assert list(callbacks) == list(before) == ["Keeper", "EMA", "quiet_one"]
    owner, wanted = callbacks[name], before[name]
    for key in path[:-1]:
        owner, wanted = owner[key], wanted[key]
    assert owner[path[-1]] == expected != wanted[path[-1]]
    owner[path[-1]] = wanted[path[-1]]
    assert callbacks == before


def test_several_options_and_appended_callbacks(parse):
    status, callbacks, err = parse(
        *FRAGMENTS[1:],
        "--trainer.callbacks.quiet_one.words=3",
        "--trainer.callbacks+=my_callbacks_of_words.Keeper",
        "--trainer.callbacks.box=my_callbacks_of_words.Box",
        "--trainer.callbacks.epochs=4",
        "--trainer.callbacks.EMA.decay=0.5",
        "--trainer.callbacks.Keeper.latency=false",
    )
    assert status == 0, err
    assert list(callbacks) == ["EMA", "quiet_one", "Keeper"]
    assert callbacks["EMA"]["decay"] == 0.5 and callbacks["quiet_one"]["words"] == 3
    assert (callbacks["Keeper"]["epochs"], callbacks["Keeper"]["latency"]) == (4, False)


def test_a_single_callback_outside_of_a_list(parse):
    _, callbacks, err = parse("--trainer.callbacks=project.callbacks.EMA", "--trainer.callbacks.EMA.decay=0.5")
    assert callbacks["EMA"]["decay"] == 0.5, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["Keper.latency=false"], "holds Keeper, EMA, quiet_one: correct the name"),
        (["+=project.callbacks.EMA", "EMA.decay=0.5"], "exactly one EMA in trainer.callbacks, but the list holds"),
        (["Keeper.latncy=false"], "Did you mean 'latency'"),
        (["Keeper.latency=perhaps"], "Keeper: latency: Expected a"),
        (["Keeper.box.bits=many"], "bits: Expected a"),
    ],
)
def test_a_mistake_gets_one_sentence(options, words, parse):
    names = [option if option[0] == "+" else f".{option}" for option in options]
    status, _, err = parse(*FRAGMENTS, *(f"--trainer.callbacks{name}" for name in names))
    assert status == 2 and err.count("\n") == 1 and words in err, err


def test_without_callbacks_there_is_none_to_reach(parse):
    status, _, err = parse("--trainer.callbacks.EMA.decay=0.5")
    assert status == 2 and "the list holds nothing" in err and err.count("\n") == 1


def test_the_value_holds_in_the_run(command, digits, logs, parse):
    options = ["--trainer.max_epochs=1", "--trainer.test_after_fit=false", "--trainer.callbacks.EMA.decay=0.5"]
    status, _, err = command("fit", *digits, *FRAGMENTS[1:], *options)
    assert status == 0, err
    saved = yaml.safe_load(Run.find(logs / "digits").config.read_text())["trainer"]["callbacks"]
    assert [item["class_path"].split(".")[-1] for item in saved] == ["EMA", "quiet_one"]
    assert saved[0]["init_args"]["decay"] == 0.5


def test_it_works_for_a_technique_among_others(parse):
    pytest.importorskip("project.compression.weight_sharing.callback")
    status, callbacks, err = parse(
        f"--config={ROOT / 'configs/compression/weight_sharing.yaml'}",
        *FRAGMENTS,
        "--trainer.callbacks.WeightSharing.latency=false",
        "--trainer.callbacks.WeightSharing.sharer.bits=3",
    )
    assert status == 0, err
    assert list(callbacks) == ["WeightSharing", "Keeper", "EMA", "quiet_one"]
    assert callbacks["WeightSharing"]["latency"] is False and callbacks["WeightSharing"]["sharer"]["bits"] == 3
    assert callbacks["Keeper"]["latency"] is True
