"""Trains as most templates do: torchvision's data set, transforms per image, DataLoader workers, contiguous layout.

Net, batch size, optimizer, schedule and flips are those of ``project fit`` on Fashion-MNIST. Lightning runs the loop,
with torchmetrics and ``self.log`` in each step. All layers use torch's own operations, without compiled kernels.

    python scripts/train_the_usual_way.py --config configs/fashion_mnist.yaml --steps 150 --workers 2
"""

import argparse
import gzip
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
import torchvision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, ToTensor

from project.data.sets.mnist import FashionMNIST
from project.frame.cli import CLI

WARMUP = 10  # first steps, not counted: workers start and torch chooses its kernels


class UsualModule(pl.LightningModule):
    """A net with cross entropy; loss and accuracy are logged in each step."""

    def __init__(self, net: torch.nn.Module, label_smoothing: float, optimizer: dict[str, Any]) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.train_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.start = self.stop = 0.0

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == WARMUP:
            self.start = time.perf_counter()
        images, labels = batch
        logits = self.net(images)
        loss = self.criterion(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/acc", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self.stop = time.perf_counter()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.optimizer  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        default="configs/fashion_mnist.yaml",
        help="configuration of net and optimizer; its data must be Fashion-MNIST",
    )
    parser.add_argument("--steps", type=int, default=150, help="number of training steps that are timed")
    parser.add_argument("--workers", type=int, default=2, help="number of DataLoader worker processes")
    args = parser.parse_args()

    os.environ["PROJECT_KERNELS"] = "0"  # the kernels would change the layout to channels-last
    cli = CLI(["--config", args.config], run=False)
    assert isinstance(cli.datamodule, FashionMNIST)
    batch_size = cli.datamodule.batch_size
    transform = Compose([RandomHorizontalFlip(), ToTensor(), Normalize((0.286,), (0.353,))])
    with tempfile.TemporaryDirectory() as root:
        unpack_for_torchvision(cli.datamodule, Path(root))
        dataset = torchvision.datasets.FashionMNIST(root, train=True, transform=transform)
        loader = DataLoader(
            dataset, batch_size, shuffle=True, num_workers=args.workers, drop_last=True, persistent_workers=True
        )
        model = cli.model
        optimizer = model.make_optimizer(model.parameter_groups())
        schedule = model.schedule.build(optimizer, len(loader), len(loader))
        module = UsualModule(model.net, model.loss.label_smoothing, {"optimizer": optimizer, "lr_scheduler": schedule})
        trainer = pl.Trainer(
            max_epochs=1,
            limit_train_batches=WARMUP + args.steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
    print(f"images_per_second {args.steps * batch_size / (module.stop - module.start):.1f}")  # noqa: T201


def unpack_for_torchvision(data: FashionMNIST, root: Path) -> None:
    """Put the four files where ``torchvision.datasets.FashionMNIST`` looks for them."""
    data.prepare_data()
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for path in (path for train in (True, False) for path in data.find(train) or ()):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (folder / path.name.removesuffix(".gz")).write_bytes(raw)


if __name__ == "__main__":
    main()
