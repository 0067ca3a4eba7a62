"""1x1 bottlenecks: what they keep, what they save, and whether the net with them is the better one at equal cost.

Szegedy et al. 2014 (arXiv:1409.4842, sec. 3 to 5, figure 2, table 1). The net with bottlenecks has the blocks of figure
2b, the other one those of figure 2a. The width of the second is chosen so that it has as many multiply-accumulates, as
many parameters, or the same latency as the first.

    python scripts/studies/bottlenecks.py
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from evidence import Study, accuracies, by, options
from plain_nets import BlockNet
from torch import nn
from verdicts import Claim, clearly, spread, verdict

from project.deployment.engines import engines
from project.deployment.latency import measure
from project.frame.paths import Paths, write_whole
from project.metrics import complexity_by_layer, count_macs, count_parameters
from project.models import Inception

SHAPE = (1, 28, 28)
SIZES = {"small": 1.0, "large": 2.0}
"""Widths of the net with bottlenecks."""
WITH = "with bottlenecks"
COSTS = ["MACs", "parameters", "latency"]
SZEGEDY = "Szegedy et al. 2014, {}"


def config() -> dict[str, Any]:
    return {
        "data": {"class_path": "project.data.FashionMNIST", "init_args": {"batch_size": 128}},
        "model": {
            "net": {"class_path": "plain_nets.BlockNet"},
            "optimizer": {
                "class_path": "torch.optim.SGD",
                "init_args": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
            },
            "schedule": {"class_path": "project.learning.Linear", "init_args": {"warmup_epochs": 1}},
        },
        "trainer": {"max_epochs": 8, "limit_train_batches": 100, "limit_val_batches": 2},
    }


def shapes(study: Study) -> None:
    """Claim 1: the shape after a 1x1 convolution, by running block 3a of GoogLeNet."""
    block = Inception(192, 64, 96, 128, 16, 32, 32)
    seen = []
    handles = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0].shape, output.shape)))
        for layer in block.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    ]
    block.eval()(torch.randn(1, 192, 28, 28))
    for handle in handles:
        handle.remove()
    kept = all(before[2:] == after[2:] and after[1] == layer.out_channels for layer, before, after in seen)
    widths = ", ".join(f"{before[1]} to {after[1]}" for _, before, after in seen)
    study.find(
        Claim("they keep height and width and set the channels", SZEGEDY.format("sec. 3")),
        verdict([1 if kept and seen else 0]),
        f"the {len(seen)} convolutions of 1x1 in block 3a keep 28 x 28 pixels and change the channels: {widths}",
    )


def arithmetic(study: Study) -> None:
    """Claim 2: weights of block 3a and multiply-accumulates of its 5x5 branch, with bottlenecks and without."""
    block = Inception(192, 64, 96, 128, 16, 32, 32)
    counted = complexity_by_layer(block, (192, 28, 28))
    convs = {name: module for name, module in block.named_modules() if isinstance(module, nn.Conv2d)}
    macs = {row.name: row.macs for row in counted if row.name in convs}
    weights = sum(conv.weight.numel() for conv in convs.values())
    branch = sum(count for name, count in macs.items() if ".conv5x5." in f".{name}")
    direct = [nn.Conv2d(192, 64, 1), nn.Conv2d(192, 128, 3, padding=1), nn.Conv2d(192, 32, 5, padding=2)]
    naive = sum(conv.weight.numel() for conv in direct)
    naive_branch = count_macs(direct[2], (192, 28, 28))
    ratios = naive / weights, naive_branch / branch
    study.find(
        Claim(
            "they make 3x3 and 5x5 cheap (block 3a: 2.4 times fewer weights, 9.7 times fewer in the 5x5 branch)",
            SZEGEDY.format("table 1"),
        ),
        verdict([1 if abs(ratios[0] - 2.4) < 0.05 else 0, 1 if abs(ratios[1] - 9.7) < 0.05 else 0]),
        f"""{weights:,} weights against {naive:,} ({ratios[0]:.2f} times); 5x5 branch {branch / 1e6:.1f} million
        multiply-accumulates against {naive_branch / 1e6:.1f} million ({ratios[1]:.2f} times)""",
    )


def equal_width(cost: Callable[[nn.Module], float], target: float) -> float:
    """The width of the net without bottlenecks that comes nearest to a cost, in steps of a hundredth."""
    widths = [number / 100 for number in range(10, 301)]
    above = bisect_left(widths, target, key=lambda width: cost(net_of(False, width)))
    nearest = widths[max(above - 1, 0) : above + 1]
    return min(nearest, key=lambda width: abs(cost(net_of(False, width)) - target))


def net_of(bottleneck: bool, width: float) -> nn.Module:
    return BlockNet(10, SHAPE, bottleneck=bottleneck, width=width).eval()


def latency_widths(study: Study) -> dict[str, float]:
    """Widths at equal latency: batch 64 in ONNX Runtime, one thread, all nets in one interleaved run. Measured once."""
    path = Paths().logs / "studies/bottlenecks/latency.json"
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    found = {}
    for size, width in SIZES.items():
        tried = {f"{width * share:.2f}": width * share for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
        nets = {WITH: net_of(True, width), **{name: net_of(False, value) for name, value in tried.items()}}
        named = {name: engines(net, SHAPE, ["onnxruntime"])["onnxruntime"] for name, net in nets.items()}
        times = measure(named, SHAPE, batch_sizes=(64,), rounds=5 if study.args.miniature else 60)
        target = times[WITH, 64].median_ms
        found[size] = round(min(tried.values(), key=lambda value: abs(times[f"{value:.2f}", 64].median_ms - target)), 2)
    if not study.args.miniature:
        write_whole(path, lambda part: part.write_text(json.dumps(found)))
    return found


def at_equal_cost(study: Study) -> dict[tuple[str, str], list[float]]:
    """Claim 3: accuracies by size, with bottlenecks and without at each equal cost."""
    widths = latency_widths(study)
    arms: dict[tuple[str, str], tuple[bool, float]] = {}
    for size, width in SIZES.items():
        net = net_of(True, width)
        chosen = {
            "MACs": equal_width(lambda net: count_macs(net, SHAPE), count_macs(net, SHAPE)),
            "parameters": equal_width(count_parameters, count_parameters(net)),
            "latency": widths[size],
        }
        arms[size, WITH] = (True, width)
        arms |= {(size, f"without, equal {cost}"): (False, chosen[cost]) for cost in COSTS}
    nets = {
        f"{size}, {name}": {"class_path": "plain_nets.BlockNet", "init_args": {"bottleneck": each, "width": width}}
        for (size, name), (each, width) in arms.items()
    }
    groups = by(study.grid("nets", config(), {"model.net": nets}), "model.net")
    study.record("nets", {str(name): runs for (name,), runs in groups.items()})
    found = {key: accuracies(groups[", ".join(key),]) for key in arms}
    rows, signs, texts = [], [], []
    for (size, name), (bottleneck, width) in arms.items():
        net = net_of(bottleneck, width)
        macs, parameters = f"{count_macs(net, SHAPE) / 1e6:.2f}", f"{count_parameters(net) / 1e3:.1f}"
        rows.append([size, name, f"{width:g}", macs, parameters, spread(found[size, name], 2, 100)])
    for size in SIZES:
        for cost in COSTS:
            with_them, without = found[size, WITH], found[size, f"without, equal {cost}"]
            signs.append(clearly(with_them, without))
            gain = spread([100 * (a - b) for a, b in zip(with_them, without, strict=True)])
            texts.append(f"{size}, equal {cost}: {gain} points")
    study.find(
        Claim(
            "at equal MACs, parameters or latency the net with bottlenecks is the more accurate",
            SZEGEDY.format("sec. 3, 4"),
        ),
        verdict(signs),
        f"gain by bottlenecks in test accuracy: {'; '.join(texts)}",
    )
    study.head("Nets of equal cost")
    study.say(
        """Fashion-MNIST, 800 steps of 128 images. The latency is that of 64 images in ONNX Runtime with one thread; the
        width at equal latency is the nearest of seven."""
    )
    study.show(["size", "net", "width", "million MACs", "thousand parameters", "test accuracy, %"], rows)
    return found


def draw(figure: Any, found: dict[tuple[str, str], list[float]]) -> None:
    """One panel a size: a point a seed, and a line at the mean."""
    for panel, size in zip(figure.subplots(1, len(SIZES), sharey=True), SIZES, strict=True):
        arms = [name for each, name in found if each == size]
        for place, name in enumerate(arms):
            values = [100 * value for value in found[size, name]]
            panel.plot([place] * len(values), values, "o", color=f"C{place > 0:d}", alpha=0.5)
            panel.plot([place - 0.25, place + 0.25], [sum(values) / len(values)] * 2, color=f"C{place > 0:d}")
        panel.set_xticks(range(len(arms)), [name.replace(", ", ",\n") for name in arms], fontsize=8)
        panel.set(title=f"{size} net", ylabel="test accuracy (%)")
        panel.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study("bottlenecks", "What 1x1 bottlenecks do", options(__doc__, arguments))
    shapes(study)
    arithmetic(study)
    found = at_equal_cost(study)
    study.head("What was scaled down")
    study.say(
        """Two Inception blocks on images of 28 x 28 pixels with one channel, and two sizes of the net. The paper's nets
        have nine blocks and up to 1,024 channels, where a direct 5x5 costs far more than here. The same recipe trains
        all nets, and it was not tuned for any of them."""
    )
    study.write(
        lambda figure: draw(figure, found),
        "Test accuracy of the net with bottlenecks and of nets without them that cost as much. A point is a seed, a"
        " line is their mean.",
        size=(10.0, 4.2),
    )


if __name__ == "__main__":
    main()
