"""What the pruning callback costs in a training step: its masks multiply the weights after each step of the optimizer.

Steps with and without it take turns on one net and batch; printed are the medians and the quartiles of what a step
costs more, in percent.

    python scripts/benchmark_pruning.py --config configs/fashion_mnist.yaml --steps 60
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch

from project.callbacks import IterativeMagnitudePruning
from project.cli import CLI
from project.compression import Pruner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion_mnist.yaml")
    parser.add_argument("--steps", type=int, default=60, help="of each kind")
    args = parser.parse_args()
    cli = CLI(["--config", args.config], run=False)
    data, model = cli.datamodule, cli.model
    net = model.net.to(memory_format=torch.channels_last).train()
    optimizer = model.make_optimizer(model.parameter_groups())
    images = torch.randn(data.batch_size, *data.image_shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(data.num_classes, (data.batch_size,))
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=cli.trainer.precision == "bf16-mixed")
    callback, pruner = IterativeMagnitudePruning(), Pruner()
    callback.masks = pruner.prune(net, pruner.groups(net, model.image_shape), {}, 0.9)
    trainer = SimpleNamespace(optimizers=[optimizer])

    def step() -> float:
        start = time.perf_counter()
        with mixed:
            logits = net(images).float()
        optimizer.zero_grad()
        model.loss(logits, labels).backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    def masked_step() -> float:
        callback._hold(trainer, model)  # type: ignore[arg-type]
        milliseconds = step()
        callback._release()
        return milliseconds

    for _ in range(5):
        step(), masked_step()
    pairs = [(masked_step(), step()) for _ in range(args.steps)]
    masked, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([100 * (one / other - 1) for one, other in pairs], n=4)
    print(f"step with masks {masked:.1f} ms, without {plain:.1f} ms")  # noqa: T201
    print(f"cost of the masks {middle:.2f} % (quartiles {low:.2f} to {high:.2f}), {args.steps} pairs of steps")  # noqa: T201


if __name__ == "__main__":
    main()
