"""Every surgery, through everything that a net goes through: saved, loaded, trained on, resumed, tested, exported to
ONNX and int8, packed.

A new surgery is a new row: the callback that makes it, as a configuration has it. The net is a small Inception on
scikit-learn's digits, one epoch as its constructor built it and two after the surgery.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.pruning_run import assert_same_runs, weights_of
from torch import Tensor

from project import callbacks, compression
from project.compression import Quantizer
from project.compression.report import accuracy
from project.data import Digits
from project.deployment.export import export_checkpoint
from project.deployment.model_file import ModelFile
from project.frame.cli import CLI
from project.frame.paths import Run
from project.learning.checkpoints import load_net
from project.models import Classifier
from project.models import surgery as surgery_module

ROWS = {
    "Thin": """
    - class_path: project.callbacks.IterativeMagnitudePruning
      init_args:
        schedule: {class_path: project.compression.OneShot, init_args: {sparsity: 0.3}}
        pruner: {class_path: project.compression.Pruner, init_args: {structure: units, scope: layer}}
        epochs_per_round: 2
        latency: false
""",
    "Factorize": """
    - class_path: project.callbacks.LowRank
      init_args:
        begin_epoch: 1
        factorizer: {class_path: project.compression.Factorizer, init_args: {macs_left: 0.7, round_to: 2}}
        latency: false
""",
    "BinarizeInputs": """
    - class_path: project.callbacks.XNORNet
      init_args: {begin_epoch: 1}
""",
    "Winograd": """
    - class_path: project.callbacks.WinogradConvolutions
      init_args: {algorithm: f4, batch_size: 32, rounds: 1, latency: false}
""",
}
"""By the class's name, as checkpoints have it: ``trainer.callbacks``."""
EPOCHS = {"Thin": 1}
"""``max_epochs``, where it is another than 3: pruning adds its rounds."""

CONFIG = """
data:
  class_path: project.data.Digits
  init_args: {batch_size: 32}
model:
  net:
    class_path: project.models.SmallInception
    init_args: {width: 0.5, stem: [16], stages: [[64]]}
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9, nesterov: true}}
  schedule: {class_path: project.learning.Linear}
trainer:
  accelerator: cpu
  observe: false
  num_sanity_val_steps: 0
  enable_progress_bar: false
"""
NEAR = 0.04
"""Of the test images int8 may get so many more wrong: 14 of 359."""


def config(folder: Path, row: str, extra: str = "") -> Path:
    text = f"{CONFIG}  max_epochs: {EPOCHS.get(row, 3)}\n  logs_dir: {folder}\n  callbacks:{ROWS[row]}{extra}"
    path = folder / f"{row}{'_stopped' if extra else ''}.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module", params=ROWS)
def row(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(row: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The row's fit, of which all tests are."""
    cli = CLI(["fit", "--config", str(config(tmp_path_factory.mktemp(row), row))])
    assert cli.trainer.run is not None
    return cli.trainer.run


@pytest.fixture(scope="module")
def onnx(run: Run) -> ModelFile:
    CLI(["export", "--run", str(run.folder)])
    return ModelFile(run.model_file("onnx"))


@pytest.fixture(scope="module")
def data() -> Digits:
    data = Digits(batch_size=64)
    data.setup("test")
    return data


@pytest.fixture(scope="module")
def images(data: Digits) -> Tensor:
    assert data.test_data is not None
    return data.normalize(data.test_data.__getitems__(list(range(128)))[0].float() / 255)


def net_of(run: Run) -> torch.nn.Module:
    """The best net, by the checkpoint alone."""
    module = Classifier.load_from_checkpoint(run.best_checkpoint, map_location="cpu", weights_only=True)
    return module.eval().net


def types_of(checkpoint: Path) -> list[str]:
    return [surgery["type"] for surgery in torch.load(checkpoint, weights_only=True)["surgeries"]]


def test_the_table_has_all_surgeries() -> None:
    for room in (callbacks, compression):  # a surgery is registered when its module is imported, at the first use
        for name in room.__all__:
            getattr(room, name)
    known = {name for name, cls in surgery_module._CLASSES.items() if cls.__module__.startswith("project.")}
    assert set(ROWS) == known, "give a new surgery a row"


def test_loaded_from_the_checkpoint_alone(run: Run, row: str, images: Tensor) -> None:
    assert types_of(run.best_checkpoint) == [row]
    net, weights = net_of(run), weights_of(run.best_checkpoint)
    state = net.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    dense = CLI(["--config", str(run.config)], run=False).model
    assert repr(net) != repr(dense.net), "the structure is another than the constructor's"
    with torch.no_grad():
        assert torch.equal(load_net(dense, run.best_checkpoint)(images), net(images))


def test_trained_on_and_saved_again(run: Run, row: str, tmp_path: Path) -> None:
    """By the configuration without the technique."""
    plain = tmp_path / "plain.yaml"
    plain.write_text(f"{CONFIG}  max_epochs: 1\n  logs_dir: {tmp_path}\n")
    cli = CLI(["fit", "--config", str(plain), "--ckpt_path", str(run.best_checkpoint)])
    saved = cli.trainer.run
    assert saved is not None and types_of(saved.last_checkpoint) == [row]
    before, after = weights_of(run.best_checkpoint), weights_of(saved.last_checkpoint)
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_resumed_is_never_stopped(run: Run, row: str, tmp_path: Path) -> None:
    """What each technique's own tests do in small, here with the fit of all the other columns."""
    whole = config(tmp_path, row)
    start = ["--trainer.experiment=resumed"]
    for stop in (1, 2, 99):
        stopper = f"    - class_path: helpers.stop_after.StopAfter\n      init_args: {{epochs: {stop}}}\n"
        path = whole if stop == 99 else config(tmp_path, row, stopper)
        cli = CLI(["fit", *start, "--config", str(path)])
        start = ["--resume", str(tmp_path / "resumed")]
    assert cli.trainer.run is not None
    assert_same_runs(cli.trainer.run, run)


def test_tested_as_the_fit_did(run: Run, data: Digits) -> None:
    cli = CLI(["test", "--run", str(run.folder)])
    reached = float(cli.trainer.callback_metrics["test/accuracy"])
    assert reached == json.loads(run.summary.read_text())["test/accuracy"]
    assert reached == pytest.approx(accuracy(net_of(run), data, "test"), abs=1e-6)
    assert reached > 0.4, "of ten classes, after 120 steps"


@pytest.mark.slow
def test_exported_to_onnx(run: Run, onnx: ModelFile, data: Digits, images: Tensor) -> None:
    with torch.no_grad():
        wanted = net_of(run)(images)
    assert (onnx.logits(images).argmax(1) == wanted.argmax(1)).float().mean() > 0.99
    assert accuracy(onnx.logits, data, "test") == pytest.approx(accuracy(net_of(run), data, "test"), abs=0.003)


def test_exported_to_int8(run: Run, onnx: ModelFile, data: Digits) -> None:
    module = Classifier.load_from_checkpoint(run.best_checkpoint, map_location="cpu", weights_only=True)
    target, quantizer = run.model_file("onnx-int8"), Quantizer(num_images=128)
    options = {"format": "onnx-int8", "fp32": onnx.path, "quantizer": quantizer, "num_images": 64, "tolerance": 1.0}
    export_checkpoint(module, data, run.best_checkpoint, target, **options)  # type: ignore[arg-type]
    assert target.stat().st_size < onnx.path.stat().st_size  # of so small a net much is the graph
    assert accuracy(ModelFile(target).logits, data, "test") > accuracy(onnx.logits, data, "test") - NEAR  # type: ignore[operator]


def test_packed_and_read_again(run: Run, images: Tensor) -> None:
    CLI(["export", "--run", str(run.folder), "--format", "packed"])
    file = ModelFile(run.model_file("packed"))
    assert file.net is not None
    found, weights = file.net.state_dict(), weights_of(run.best_checkpoint)
    assert list(found) == list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
    with torch.no_grad():
        wanted = net_of(run).to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert torch.equal(file.logits(images), wanted)
