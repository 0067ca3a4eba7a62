"""The whole chain in one run: train, prune, share, pack; the file is the net, and a killed run ends in its bytes."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.process import Process
from helpers.pruning_run import STEPS, fit, pruning, weights_of
from lightning.pytorch import Callback

from project.callbacks import Packing, PostTrainingQuantization, TernaryWeights, WeightSharing
from project.compression.report_rows import read_report
from project.deployment.model_file import ModelFile
from project.frame.cli import CLI
from project.frame.paths import Run

ROOT = Path(__file__).resolve().parents[3]

CHAIN = """
data:
  class_path: project.data.Digits
  init_args: {batch_size: 64}
model:
  net: helpers.pruning_run.TinyNet
  schedule: {class_path: project.learning.Linear}
trainer:
  max_epochs: 2
  limit_train_batches: 6
  accelerator: cpu
  observe: false
  test_after_fit: false
  enable_progress_bar: false
  callbacks:
    - class_path: helpers.pruning_run.Brake
    - class_path: project.callbacks.IterativeMagnitudePruning
      init_args:
        schedule: {class_path: project.compression.Sparsities, init_args: {levels: [0.5, 0.8]}}
        after: rewind_lr
        latency: false
    - class_path: project.callbacks.WeightSharing
      init_args:
        sharer: {class_path: project.compression.Sharer, init_args: {bits: 3}}
        epochs: 2
        latency: false
    - class_path: project.callbacks.Packing
    - class_path: project.callbacks.DistillFrom
"""
PARTS = 4
"""Dense, two rounds, shared: two epochs each."""


def test_one_run_makes_every_step_and_the_file_is_the_last(tmp_path: Path) -> None:
    config = tmp_path / "chain.yaml"
    config.write_text(CHAIN)
    cli = CLI(["--config", str(config), "--trainer.logs_dir", str(tmp_path)], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    run = cli.trainer.run
    assert run is not None
    rows = read_report(run.report)
    assert [row.step for row in rows] == ["dense", "pruned 50.00 %", "pruned 79.98 %", "weight_sharing", "packed"]
    shared, packed = rows[-2:]
    path = run.model_file("packed")
    assert packed.file_bytes == path.stat().st_size < 0.2 * 4 * (packed.num_parameters or 0)
    assert packed.test_accuracy == shared.test_accuracy
    file, weights = ModelFile(path, ["helpers.pruning_run"]), weights_of(run.best_checkpoint)
    assert file.net is not None
    found = file.net.state_dict()
    assert found.keys() == weights.keys()
    for name, value in weights.items():  # -0 and 0 are the same weight
        assert torch.equal(found[name], value), name
    for number, row in enumerate(rows[:-1]):
        assert row.file == run.level_checkpoint(number).name and run.level_checkpoint(number).is_file()


@pytest.mark.slow
def test_a_chain_killed_at_any_moment_ends_in_the_same_file(tmp_path: Path, logs: Path, command: Any) -> None:
    """SIGKILL in each part of the chain and while a process starts or the file is written."""
    config = tmp_path / "chain.yaml"
    config.write_text(CHAIN)
    status, _, errors = command("fit", "--config", config, "--trainer.experiment=whole")
    assert status == 0, errors
    chosen = random.Random(0)
    steps: list[int | None] = [part * 2 * STEPS + chosen.randrange(2 * STEPS - 2) for part in range(PARTS)]
    steps.insert(chosen.randrange(PARTS), None)
    steps.append(PARTS * 2 * STEPS - 1)  # the last step: what follows is the end of the run
    num_kills = 0
    for number, step in enumerate(steps):
        process = Process(config, logs)
        if step is not None:
            process.wait_for(step)
        longest = 6.0 if step is None else 1.0 if number == len(steps) - 1 else 0.1
        time.sleep(chosen.uniform(0, longest))
        num_kills += process.kill()
    assert num_kills >= PARTS
    Process(config, logs).finish()
    killed, whole = Run.find(logs / "killed"), Run.find(logs / "whole")
    assert killed.model_file("packed").read_bytes() == whole.model_file("packed").read_bytes()
    assert [row.step for row in read_report(killed.report)] == [row.step for row in read_report(whole.report)]


@pytest.mark.parametrize(
    ("callbacks", "sentence"),
    [
        ([Packing(), WeightSharing()], "stands before WeightSharing"),
        ([Packing(), pruning()], "stands before IterativeMagnitudePruning"),
        ([Packing(), TernaryWeights()], "stands before TernaryWeights"),
        ([Packing(), PostTrainingQuantization()], "only an ONNX file stores"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(tmp_path: Path, callbacks: list[Callback], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(tmp_path, *callbacks)


def test_a_config_of_the_chain_is_complete() -> None:
    """The shipped chain has the parts of this one, in this order."""
    shipped = yaml.safe_load((ROOT / "configs/deep_compression.yaml").read_text())
    parts = [callback["class_path"] for callback in shipped["trainer"]["callbacks"]]
    wanted = [each["class_path"] for each in yaml.safe_load(CHAIN)["trainer"]["callbacks"][1:]]
    assert [part for part in parts if part in wanted] == wanted
