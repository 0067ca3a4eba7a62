"""A pruning run that is stopped or killed, and resumed by a new process, ends in the bits of one never stopped."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.process import Process
from helpers.pruning_run import (
    NUM_PRUNED,
    PRUNED,
    STEPS,
    FailBetween,
    Watch,
    assert_same_runs,
    depthwise_net,
    differences,
    fit,
    layer_norm_net,
    num_zeros,
    pruning,
    same,
    state_of,
    vision_transformer,
)
from helpers.slow import fast
from helpers.stop_after import StopAfter
from helpers.versioned_net import Versioned
from lightning.pytorch import Callback, Trainer

from project.callbacks import EMA
from project.compression import Gradual, Iterative, Pruner
from project.frame.paths import Run
from project.metrics.complexity import count_macs

# -- stopped after an epoch ------------------------------------------------------------------------------------------

CALLBACKS: dict[str, Callable[[], list[Any]]] = {
    "rewind": lambda: [pruning(schedule=Iterative(0.3, 2), after="rewind", rewind_to="5it")],
    "reinit random": lambda: [
        EMA(0.8),
        pruning(schedule=Iterative(0.3, 2), pruner=Pruner(criterion="random"), after="reinit"),
    ],
    "finetune units": lambda: [
        pruning(schedule=Iterative(0.3, 2), pruner=Pruner("units", exclude=["fc"])),
        EMA(0.8),
    ],
    "rewind_lr obd": lambda: [
        pruning(schedule=Iterative(0.3, 2), pruner=Pruner(criterion="obd", num_images=40), after="rewind_lr"),
        EMA(0.8),
    ],
    "dead ends": lambda: [
        EMA(0.8),
        pruning(schedule=Iterative(0.75, 2), pruner=Pruner(exclude=[], budget="effective", keep=0.02)),
    ],
    "gradual": lambda: [pruning(schedule=Gradual(0.8, 0.5, 5.0, every_n_steps=4)), EMA(0.8)],
}


@pytest.mark.parametrize("stops", fast([(3,), (2, 4)]), ids=["in a round", "between rounds"])
@pytest.mark.parametrize("callbacks", CALLBACKS)
def test_stopped_and_resumed_is_never_stopped(tmp_path, callbacks, stops):
    make, epochs = CALLBACKS[callbacks], 6 if callbacks == "gradual" else 2
    whole = fit(tmp_path / "whole", *make(), epochs=epochs)
    run = None
    for number, stop in enumerate((*stops, 99)):
        outcome = fit(tmp_path / "resumed", *make(), StopAfter(stop), epochs=epochs, seed=number, resume=run)
        run = outcome.run
        assert outcome.trainer.global_step == STEPS * min(stop, 6)
    assert_same_runs(run, whole.run)
    assert not differences(state_of(outcome.model.net), state_of(whole.model.net))
    assert run.metrics.read_text() == whole.run.metrics.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(3,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=["in a round", "between"])
@pytest.mark.parametrize("net", [depthwise_net, layer_norm_net, vision_transformer])
def test_units_of_any_net_leave_and_are_rewound_and_a_resumed_run_is_never_stopped(tmp_path, net, stops):
    def make() -> list[Any]:
        units = Pruner("units", "gradient", budget="macs", round_to=1, num_images=40)
        return [EMA(0.8), pruning(schedule=Iterative(0.3, 2), pruner=units, after="rewind", rewind_to="5it")]

    adamw = partial(torch.optim.AdamW, lr=0.01)
    whole, run = fit(tmp_path / "whole", *make(), net=net, optimizer=adamw), None
    for number, stop in enumerate((*stops, 99)):
        options = {"net": net, "optimizer": adamw, "seed": number, "resume": run}
        outcome = fit(tmp_path / "resumed", *make(), StopAfter(stop), **options)
        run = outcome.run
    assert_same_runs(run, whole.run)
    assert not differences(state_of(outcome.model.net), state_of(whole.model.net))
    assert run.metrics.read_text() == whole.run.metrics.read_text()
    assert len(outcome.model.surgeries) == 2
    assert count_macs(outcome.model.net, (1, 8, 8)) <= 0.49 * count_macs(net(), (1, 8, 8))


def test_a_run_of_an_older_version_that_has_masked_units_loses_them(tmp_path):
    """Units were masked until the end of the run, with one number for each unit in the masks of what makes it."""

    def make() -> list[Any]:
        return [EMA(0.8), pruning(schedule=Iterative(0.25, 1), pruner=Pruner("units", scope="layer"))]

    run = fit(tmp_path, *make(), StopAfter(2)).run
    content = torch.load(run.last_checkpoint, weights_only=True)
    state = next(value for value in content["callbacks"].values() if "masks" in value)
    names = ("conv2.conv.weight", "conv2.norm.weight", "conv2.norm.bias")
    kept = torch.arange(16) % 4 != 1
    state["masks"] = {name: kept.view(-1, *[1] * (3 if "conv.w" in name else 0)) for name in names}
    del state["whole"]
    torch.save(content, run.last_checkpoint)
    callbacks = make()
    outcome = fit(tmp_path, *callbacks, resume=run)
    assert outcome.model.surgeries[0]["slices"]["conv2.conv.weight"][0] == kept.nonzero().flatten().tolist()
    assert outcome.model.net.conv2.conv.out_channels == 9 and outcome.model.net.conv1.conv.out_channels == 6
    assert callbacks[1].whole.units == {"conv1.conv": 8, "conv2.conv": 16}


@pytest.mark.parametrize(("rewind_to", "stop", "epochs_done"), [("1ep", 1, 1.0), ("3it", 1, 0.5), ("3it", 3, 0.5)])
def test_a_round_is_rewound_to_its_share_of_the_dense_training(tmp_path, rewind_to, stop, epochs_done):
    """A resume with half as many steps an epoch has the rewound weights, and the rate of that part of the schedule."""

    def make() -> list[Any]:
        return [pruning(schedule=Iterative(0.3, 2), after="rewind", rewind_to=rewind_to, epochs_per_round=1), watch]

    watch = Watch()
    run = fit(tmp_path, *make(), StopAfter(stop)).run
    first, watch = watch, Watch()
    fit(tmp_path, *make(), resume=run, seed=1, accumulate_grad_batches=2)
    steps = sorted(watch.before)
    begun = watch.before[steps[-STEPS // 2]]  # the last round
    point = {"1ep": watch.before[steps[0]], "3it": first.before[3]}[rewind_to].weights
    names = [name for name in begun.weights if name not in PRUNED and "running" not in name and "batches" not in name]
    assert names and not differences(*({name: each[name] for name in names} for each in (begun.weights, point)))
    assert begun.lr == pytest.approx(0.1 * (1 - round(epochs_done * STEPS / 2) / STEPS))


def test_gradual_pruning_ends_in_its_epoch(tmp_path):
    """A resume with half as many steps an epoch prunes on to the same epoch."""

    def make() -> list[Any]:
        return [pruning(schedule=Gradual(0.8, 0.5, 4.0, every_n_steps=1)), watch]

    watch = Watch()
    run = fit(tmp_path, *make(), StopAfter(2), epochs=6).run
    watch = Watch()
    fit(tmp_path, *make(), epochs=6, resume=run, seed=1, accumulate_grad_batches=2)
    gone = [num_zeros(watch.before[step].weights) for step in sorted(watch.before)]
    end = 2 * STEPS // 2  # steps from epoch 2 to the end of the pruning, with half as many an epoch
    assert gone[end] == gone[-1] == round(0.8 * NUM_PRUNED) and gone[end - 1] < gone[end]


def test_resumed_within_an_epoch_its_row_has_the_sparsity(tmp_path):
    class Fail(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 2 * STEPS + 4:
                raise RuntimeError("no power")

    def make() -> list[Any]:
        return [pruning(schedule=Iterative(0.3, 1))]

    whole = fit(tmp_path / "whole", *make(), val_check_interval=0.5).run
    with pytest.raises(RuntimeError, match="no power"):
        fit(tmp_path / "resumed", *make(), Fail(), val_check_interval=0.5)
    run = Run(tmp_path / "resumed/pruning/version_0")
    run.config.touch()
    fit(tmp_path / "resumed", *make(), val_check_interval=0.5, resume=run)
    assert run.metrics.read_text() == whole.metrics.read_text()


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_level_is_its_own_though_best_is_already_of_the_next(tmp_path, epoch):
    """The first epoch of a round has written ``best.ckpt``, but is to be trained again: the level before is kept."""
    make = CALLBACKS["rewind_lr obd"]
    whole = fit(tmp_path / "whole", *make()).run
    with pytest.raises(RuntimeError, match="no power"):
        fit(tmp_path / "resumed", *make(), FailBetween(epoch))
    run = Run(tmp_path / "resumed/pruning/version_0")
    run.config.touch()
    best = torch.load(run.best_checkpoint, weights_only=True)
    assert best["callbacks"]["IterativeMagnitudePruning"]["round"] == epoch // 2
    assert torch.load(run.last_checkpoint, weights_only=True)["epoch"] == epoch - 1
    resumed = fit(tmp_path / "resumed", *make(), FailBetween(99), seed=1, resume=run).run
    assert_same_runs(resumed, whole)


# -- killed --------------------------------------------------------------------------------------------------------

CONFIG = """
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
  callbacks:
    - class_path: helpers.pruning_run.Brake
    - class_path: helpers.pruning_run.SaveMasks
    - class_path: project.callbacks.IterativeMagnitudePruning
      init_args:
        schedule: {class_path: project.compression.Iterative, init_args: {fraction: 0.3, rounds: 3}}
        report: false
"""
EMA_TOO = {"class_path": "project.callbacks.EMA", "init_args": {"decay": 0.9}}
SHARED_TOO = {
    "class_path": "project.callbacks.WeightSharing",
    "init_args": {"epochs": 2, "num_images": 64, "report": False},
}
RUNS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "weights, rewind 5it": ({"after": "rewind", "rewind_to": "5it"}, []),
    "units, finetune, EMA": (
        {"after": "finetune", "pruner.structure": "units", "pruner.exclude": ["fc"], "pruner.round_to": 4},
        [EMA_TOO],
    ),
    "weights, rewind_lr, EMA, OBD": (
        {"after": "rewind_lr", "pruner.criterion": "obd", "pruner.num_images": 40},
        [EMA_TOO],
    ),
    "weights, finetune, shared": ({"after": "finetune"}, [SHARED_TOO]),
}
LEVELS = 4
LEVEL_STEPS = 2 * STEPS


def config_of(name: str, path: Path) -> Path:
    options, more = RUNS[name]
    config = yaml.safe_load(CONFIG)
    init_args = config["trainer"]["callbacks"][2]["init_args"]
    for key, value in options.items():
        if key.startswith("pruner."):
            pruner = init_args.setdefault("pruner", {"class_path": "project.compression.Pruner", "init_args": {}})
            pruner["init_args"][key.removeprefix("pruner.")] = value
        else:
            init_args[key] = value
    config["trainer"]["callbacks"] += more
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_moment_and_resumed_is_never_killed(name, tmp_path, logs, command):
    """SIGKILL, once in each level and once while a process starts: at a random step, and then a random moment that may
    be in a step, in validation, while checkpoints are written or a round begins.
    """
    config = config_of(name, tmp_path / "pruning.yaml")
    status, _, errors = command("fit", "--config", config, "--trainer.experiment=whole")
    assert status == 0, errors

    chosen = random.Random(name)
    starts = [LEVEL_STEPS * level for level in range(LEVELS + (SHARED_TOO in RUNS[name][1]))]
    steps: list[int | None] = [start + chosen.randrange(LEVEL_STEPS - 4) for start in starts]
    steps.insert(chosen.randrange(LEVELS + 1), None)  # while it starts
    num_kills = 0
    for step in steps:
        process = Process(config, logs)
        if step is not None:
            process.wait_for(step)
        time.sleep(chosen.uniform(0, 6.0 if step is None else 0.1))
        num_kills += process.kill()
    assert num_kills >= LEVELS
    Process(config, logs).finish()
    killed, whole = Run.find(logs / "killed"), Run.find(logs / "whole")
    assert_same_runs(killed, whole)
    ends = [torch.load(run.folder / "process_0.pt", weights_only=True) for run in (killed, whole)]
    assert same(*ends) and bool(ends[0]["masks"]) == ("units" not in name)  # units leave the net
    rows, expected = (run.metrics.read_text().splitlines() for run in (killed, whole))
    assert rows == expected


@pytest.mark.parametrize("structure", ["weights", "units"])
def test_a_net_that_asks_for_the_version_of_its_weights_is_rewound_and_resumed(tmp_path, structure):
    def make() -> list[Any]:
        pruner = Pruner(structure, "magnitude", round_to=1)
        return [EMA(0.8), pruning(schedule=Iterative(0.3, 2), pruner=pruner, after="rewind", rewind_to="5it")]

    whole = fit(tmp_path / "whole", *make(), net=Versioned)
    stopped = fit(tmp_path / "resumed", *make(), StopAfter(3), net=Versioned)
    outcome = fit(tmp_path / "resumed", *make(), net=Versioned, seed=1, resume=stopped.run)
    assert not differences(state_of(outcome.model.net), state_of(whole.model.net))
    assert len(outcome.model.surgeries) == (2 if structure == "units" else 0)
