"""Trains with a loop written by hand, without Lightning, to measure how much time the framework takes.

Net, data tensor, batched augmentation, memory layout, precision, optimizer, schedule and loss are those of ``project
fit``. Accuracy and loss of the epoch are summed up on the device, without waiting for their values.

    python scripts/train_by_hand.py --config configs/fashion_mnist.yaml --steps 150
"""

import argparse
import math
import time

import torch

from project.data import BatchRandom
from project.frame.cli import CLI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/fashion_mnist.yaml", help="configuration of data, net, loss and optimizer"
    )
    parser.add_argument("--epochs", type=int, default=1, help="number of epochs to train")
    parser.add_argument("--steps", type=int, default=150, help="largest number of steps in an epoch")
    args = parser.parse_args()

    cli = CLI(["--config", args.config], run=False)
    data, model = cli.datamodule, cli.model
    data.prepare_data()
    data.setup("fit")
    images, labels = data.train_data.images_at(data.train_data.indices), data.train_data.labels
    net, augment, batch_size = model.net.to(memory_format=torch.channels_last), data.augment, data.batch_size
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=cli.trainer.precision == "bf16-mixed")
    steps = min(len(labels) // batch_size, args.steps)
    weights = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    optimizer = model.make_optimizer([{"params": weights}, {"params": others, "weight_decay": 0.0}])
    schedule = model.schedule.build(optimizer, args.epochs * steps, steps)["scheduler"]
    mean, std = torch.tensor(data.mean).view(-1, 1, 1), torch.tensor(data.std).view(-1, 1, 1)

    net.train()
    start = time.perf_counter()
    for epoch in range(args.epochs):
        order = torch.randperm(len(labels))
        total = torch.zeros(2)
        for step in range(steps):
            indices = order[step * batch_size : (step + 1) * batch_size]
            batch, targets = images[indices].float().div_(255), labels[indices]
            random = BatchRandom(0, epoch, indices)
            for transform in augment:
                batch = transform(batch, random)
            batch = ((batch - mean) / std).contiguous(memory_format=torch.channels_last)
            if data.mix is not None:
                batch, targets = data.mix(batch, targets, random, data.num_classes)
            with mixed:
                logits = net(batch).float()
            loss = model.loss(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            labels_of = targets if targets.dim() == 1 else targets.argmax(dim=1)
            total += torch.stack([loss.detach(), (logits.argmax(dim=1) == labels_of).sum()])
        assert math.isfinite(total[0].item())
    seconds = time.perf_counter() - start
    print(f"images_per_second {args.epochs * steps * batch_size / seconds:.1f}")  # noqa: T201


if __name__ == "__main__":
    main()
