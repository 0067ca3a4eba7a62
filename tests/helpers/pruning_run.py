"""For the tests of pruning: runs in miniature (digits, two convolutions, rounds of an epoch or two), and witnesses."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn

from project.callbacks import BestAndLast, IterativeMagnitudePruning
from project.data import Digits
from project.frame.paths import Run
from project.frame.verbs import Trainer
from project.learning.schedules import Linear
from project.models import Classifier
from project.models.layers import ConvNormAct, GlobalAvgPool, init_weights_

STEPS = 6
"""Optimizer steps of an epoch."""
PRUNED = ("conv1.conv.weight", "conv2.conv.weight")
"""What the default pruner prunes of :class:`TinyNet`: 72 and 1152 weights."""
NUM_PRUNED = 72 + 1152


class TinyNet(nn.Module):
    """Convolutions of 8 and 16 channels, dropout, linear: ``[N, 1, 8, 8] -> [N, 10]``."""

    def __init__(self, num_classes: int = 10, image_shape: tuple[int, int, int] = (1, 8, 8)) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(image_shape[0], 8, 3, 2)
        self.conv2 = ConvNormAct(8, 16, 3)
        self.pool = GlobalAvgPool()
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, num_classes)
        init_weights_(self, nn.init.kaiming_normal_)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.pool(self.conv2(self.conv1(images)))))


def depthwise_net() -> nn.Module:
    """An inverted residual block (MobileNetV2) between a stem and a head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm1 = nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24)
            self.deep, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
            self.back, self.norm3 = nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            wide = nn.functional.relu6(self.norm1(self.wide(x)))
            return x + self.norm3(self.back(nn.functional.hardswish(self.norm2(self.deep(wide)))))

    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), Block(), Block(), GlobalAvgPool(), nn.Linear(8, 10))


def layer_norm_net() -> nn.Module:
    """A block with layer norm and a layer scale (ConvNeXt) between a stem and a head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
            self.wide, self.back, self.scale = nn.Linear(16, 32), nn.Linear(32, 16), nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.deep(x).permute(0, 2, 3, 1))
            y = self.scale * self.back(nn.functional.gelu(self.wide(y)))
            return x + y.permute(0, 3, 1, 2)

    return nn.Sequential(nn.Conv2d(1, 16, 2, 2), Block(), Block(), GlobalAvgPool(), nn.Linear(16, 10))


def vision_transformer() -> nn.Module:
    """Patches, two of torch's encoder layers, and a head."""

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.place = nn.Conv2d(1, 16, 2, 2), nn.Parameter(0.02 * torch.randn(1, 16, 16))
            layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2) + self.place
            return self.head(self.norm(self.encoder(tokens)).mean(1))

    return Vit()


class DigitsOnce(Digits):
    """Reads the images once for all tests."""

    _read: dict[bool, tuple[Tensor, Tensor]] = {}

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        if train not in self._read:
            self._read[train] = super().load(train)
        return self._read[train]


@dataclass
class Moment:
    """The net and its optimizer at one moment."""

    weights: dict[str, Tensor]
    lr: float
    state: dict[int, Any]
    """The optimizer's, such as momentum."""


class Watch(Callback):
    """Keeps the net before each step (by the step's number) and after it; give it after the callback it watches."""

    def __init__(self) -> None:
        self.before: dict[int, Moment] = {}
        self.after: dict[int, Moment] = {}

    def on_train_batch_start(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        self.before[trainer.global_step] = _moment(trainer, pl_module)

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        self.after[trainer.global_step - 1] = _moment(trainer, pl_module)


def _moment(trainer: LightningTrainer, module: LightningModule) -> Moment:
    (optimizer,) = trainer.optimizers
    state = deepcopy(optimizer.state_dict()["state"])
    return Moment(state_of(module.net), optimizer.param_groups[0]["lr"], state)  # type: ignore[arg-type]


class SaveMasks(Callback):
    """Writes each process's masks and weights into the run's folder."""

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        (callback,) = (each for each in trainer.callbacks if isinstance(each, IterativeMagnitudePruning))  # type: ignore[attr-defined]
        content = {"masks": callback.masks, "weights": state_of(pl_module.net)}  # type: ignore[arg-type]
        torch.save(content, trainer.run.folder / f"process_{trainer.global_rank}.pt")  # type: ignore[attr-defined]


@dataclass
class Outcome:
    """What a fit left."""

    trainer: Trainer
    model: Classifier
    run: Run


def pruning(**options: Any) -> IterativeMagnitudePruning:
    """Our callback without the measurements at the end."""
    return IterativeMagnitudePruning(**{"report": False, **options})


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def fit(
    folder: Path,
    *callbacks: Callback,
    epochs: int | None = 2,
    seed: int = 0,
    optimizer: Any = sgd,
    channels_last: bool = True,
    resume: Run | None = None,
    net: Callable[[], nn.Module] = TinyNet,
    **options: Any,
) -> Outcome:
    """A run in ``folder``, of ``epochs`` before anything is pruned, or one that is resumed by a new process's net."""
    torch.manual_seed(seed)
    model = Classifier(net(), 10, (1, 8, 8), optimizer=optimizer, schedule=Linear(), channels_last=channels_last)
    fixed = {"accelerator": "cpu", "logger": False, "observe": False, "enable_progress_bar": False}
    trainer = Trainer(
        experiment="pruning",
        logs_dir=str(folder),
        callbacks=list(callbacks),
        max_epochs=epochs,
        limit_train_batches=STEPS,
        num_sanity_val_steps=0,
        test_after_fit=False,
        **fixed,
        **options,
    )
    trainer.fit(model, datamodule=DigitsOnce(batch_size=64, seed=0), resume=resume and str(resume.folder))
    assert trainer.run is not None
    trainer.run.config.touch()  # what the command line writes, and a resume looks for
    return Outcome(trainer, model, trainer.run)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def weights_of(checkpoint: Path, key: str = "state_dict") -> dict[str, Tensor]:
    """The net's weights in a checkpoint, by their names in the net."""
    content = torch.load(checkpoint, weights_only=True)[key]
    return {name.removeprefix("net."): value for name, value in content.items() if name.startswith("net.")}


def masked(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value * masks[name] if name in masks else value for name, value in weights.items()}


def num_zeros(weights: dict[str, Tensor]) -> int:
    return sum(int((weights[name] == 0).sum()) for name in PRUNED)


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names whose bits differ."""
    return [name for name in {**first, **second} if not torch.equal(first[name], second[name])]


class Brake(Callback):
    """Tells another process each step in the run's folder, and waits for a moment, so that it can be killed there."""

    def on_train_batch_start(self, trainer: LightningTrainer, *_: Any) -> None:
        with (trainer.run.folder / "steps.txt").open("a") as file:  # type: ignore[attr-defined]
            file.write(f"{trainer.global_step}\n")
        time.sleep(0.01)


COMPARED = ("state_dict", "ema_raw_weights", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def assert_same_runs(resumed: Run, whole: Run) -> None:
    """All checkpoints, with masks, averages and optimizer."""
    paths = sorted(path.name for path in whole.checkpoints.glob("*.ckpt"))
    assert paths == sorted(path.name for path in resumed.checkpoints.glob("*.ckpt") if not path.name.startswith("."))
    for name in paths:
        first, second = (torch.load(run.checkpoints / name, weights_only=True) for run in (resumed, whole))
        assert [key for key in COMPARED if not same(first.get(key), second.get(key))] == [], name
        states = [content.get("callbacks", {}) for content in (first, second)]
        for key in ("IterativeMagnitudePruning", "EMA", "WeightSharing"):
            assert same(*(state.get(key) for state in states)), (name, key)


class FailBetween(BestAndLast):
    """Ends the process after ``best.ckpt`` of an epoch is written and before ``last.ckpt`` is."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("no power")
        super()._save_last_checkpoint(trainer, monitor_candidates)
