"""For the tests of several processes: one fit, in one process or in two that are forked, and what came of it."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn

from project.data import Digits, HorizontalFlip, RandomAffine
from project.frame.verbs import Trainer
from project.learning.schedules import Linear
from project.models import BatchNorm, Classifier, DropPath
from project.models.layers import ConvNormAct, GlobalAvgPool, MaxPool

BATCH = 96
"""Images of a step, in all processes together."""
NUM_VAL = 121
STEPS = 5
EPOCHS = 3


class Net(nn.Module):
    """Two convolutions with all that depends on the batch: ``[N, 1, 8, 8] -> [N, 10]``."""

    def __init__(self, pool: Callable[[int], nn.Module] = MaxPool) -> None:
        super().__init__()
        self.stem = ConvNormAct(1, 8, 3, norm=BatchNorm, pool=lambda: pool(2))
        self.spatial = nn.Dropout2d(0.1)
        self.conv = ConvNormAct(8, 16, 3, norm=BatchNorm)
        self.path = DropPath(0.1)
        self.pool = GlobalAvgPool()
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(self.spatial(self.stem(images)))
        return self.fc(self.dropout(self.pool(x + self.path(x))))


class Keep(Callback):
    """Writes what each process has at the end of a fit; give it last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        states = {type(each).__name__: each.state_dict() for each in trainer.callbacks}  # type: ignore[attr-defined]
        content = {
            "net": {name: value.clone() for name, value in pl_module.net.state_dict().items()},  # type: ignore[union-attr]
            "metrics": {name: value.clone() for name, value in trainer.callback_metrics.items()},
            "masks": states.get("IterativeMagnitudePruning", {}).get("masks", {}),
            "num_val_images": sum(len(batch[0]) for batch in trainer.val_dataloaders),
        }
        torch.save(content, self.folder / f"process_{trainer.global_rank}.pt")


def fit(folder: Path, processes: int, *callbacks: Callback, **options: Any) -> list[dict[str, Any]]:
    """What :class:`Keep` wrote, by process; the trainer's folder is ``folder/pair`` or ``folder/one``.

    Two processes are forked by a fresh one: torch cannot compute gradients in a fork of a process in which another test
    has started autograd's threads.

    Args:
        folder: the test's own folder.
        processes: 1 or 2.
        callbacks: the trainer's callbacks.
        options: ``data``, ``model``, ``pool`` and ``net`` as :func:`_fit` has them; all others are the trainer's.
    """
    place = folder / ("one" if processes == 1 else "pair")
    place.mkdir()
    if processes == 1:
        _fit(place, processes, callbacks, **options)
    else:
        work = cloudpickle.dumps((place, processes, callbacks, options))
        context = multiprocessing.get_context("forkserver")  # a process that has imported all this, and no more
        context.set_forkserver_preload(["project.frame.verbs", "project.callbacks", "project.data"])
        fresh = context.Process(target=_fit_fresh, args=(work, dict(os.environ)))
        fresh.start()
        fresh.join()
        assert fresh.exitcode == 0, "the error is printed above"
    return [torch.load(place / f"process_{rank}.pt", weights_only=True) for rank in range(processes)]


def _fit_fresh(work: bytes, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    place, processes, callbacks, options = pickle.loads(work)
    _fit(place, processes, callbacks, **options)


def _fit(
    place: Path,
    processes: int,
    callbacks: tuple[Callback, ...],
    *,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    pool: Callable[[int], nn.Module] = MaxPool,
    net: nn.Module | None = None,
    **options: Any,
) -> None:
    torch.manual_seed(0)
    classifier = Classifier(net or Net(pool), 10, (1, 8, 8), **{"schedule": Linear(), **(model or {})})
    augment = [HorizontalFlip(), RandomAffine(degrees=10, translate=0.1)]
    loader = Digits(batch_size=BATCH // processes, eval_batch_size=50, augment=augment, seed=0, **(data or {}))
    loader.val_fraction = NUM_VAL / 1438
    devices = {"strategy": "ddp_fork", "sync_batchnorm": True} if processes > 1 else {}
    trainer = Trainer(
        logs_dir=str(place),
        callbacks=[*callbacks, Keep(place)],
        devices=processes,
        accelerator="cpu",
        limit_train_batches=STEPS,
        num_sanity_val_steps=0,
        test_after_fit=False,
        **{"precision": "64-true", "max_epochs": EPOCHS, "logger": False, "observe": False, **devices, **options},
        enable_progress_bar=False,
    )
    with deadline(180):
        trainer.fit(classifier, datamodule=loader)


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Processes that wait for each other forever are killed."""

    def end(*_: Any) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        raise TimeoutError(f"the processes did not end in {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest relative distance of two tensors of one name, in norms."""
    assert first.keys() == second.keys()
    return max(
        float((first[name].double() - second[name].double()).norm() / second[name].double().norm().clamp(min=1e-12))
        for name in first
    )
