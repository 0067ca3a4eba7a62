"""Measures how much time the pruning callback adds to a training step.

After each step of the optimizer the callback multiplies the weights by their masks. Steps with and without masks take
turns on the same net and batch, and each kind goes first in every second pair. The script prints both medians, the
additional time in percent (median, its confidence interval, quartiles of all pairs), and the time of the products
measured on their own. This last number is the more accurate one if other work disturbs the machine.

    python scripts/benchmark_pruning.py --config configs/fashion_mnist.yaml --steps 60
"""

import argparse
import statistics
import time

import torch
from torch import nn

from project.compression.pruning.held_masks import HeldMasks
from project.compression.pruning.masks import Masks, apply_masks_
from project.compression.pruning.pruner import Pruner
from project.frame.cli import CLI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/fashion_mnist.yaml", help="configuration of the net, batch size and optimizer"
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="number of training steps with masks, and of those without"
    )
    args = parser.parse_args()
    cli = CLI(["--config", args.config], run=False)
    data, model = cli.datamodule, cli.model
    net = model.net.to(memory_format=torch.channels_last).train()
    optimizer = model.make_optimizer(model.parameter_groups())
    images = torch.randn(data.batch_size, *data.image_shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(data.num_classes, (data.batch_size,))
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=cli.trainer.precision == "bf16-mixed")
    held, pruner = HeldMasks(), Pruner()
    masks = pruner.prune(net, pruner.groups(net, model.image_shape), {}, 0.9)

    def step() -> float:
        start = time.perf_counter()
        with mixed:
            logits = net(images).float()
        optimizer.zero_grad()
        model.loss(logits, labels).backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    def masked_step() -> float:
        held.hold(net, masks, optimizer)
        milliseconds = step()
        held.release()
        return milliseconds

    for _ in range(5):
        step(), masked_step()
    pairs = []
    for number in range(args.steps):
        if number % 2:
            pairs.append((masked_step(), step()))
        else:
            plain = step()
            pairs.append((masked_step(), plain))
    masked, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([100 * (one / other - 1) for one, other in pairs], n=4)
    print(f"step with masks {masked:.1f} ms, without {plain:.1f} ms")  # noqa: T201
    error = 1.57 * (high - low) / args.steps**0.5  # McGill, Tukey & Larsen 1978: half of a 95 % interval of the median
    print(f"cost of the masks {middle:.2f} ± {error:.2f} % (quartiles {low:.2f} to {high:.2f}), {args.steps} pairs")  # noqa: T201
    alone = products_ms(net, masks, 10 * args.steps)
    print(f"the products alone {alone:.3f} ms, {100 * alone / plain:.2f} % of a step")  # noqa: T201


def products_ms(net: nn.Module, masks: Masks, repeats: int) -> float:
    """Median time in ms of the products of weights and masks, which the hook computes after each step."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        apply_masks_(net, masks)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    main()
