"""Compares Winograd's algorithm with direct convolution: single 3x3 layers, whole nets, and rounding errors.

The layers and nets are those of this package. All variants take turns in rounds. The script prints median times in
milliseconds, and the median and the 5th to the 95th percentile of the speedup. Direct convolution is measured in two
variants: PyTorch's own (oneDNN), channels-last and without gradients, and the same with a weight that is packed once
(``torch.utils.mkldnn``). The speedup is relative to the faster of the two.

    python scripts/benchmark_winograd.py layers --net GoogLeNet --batch-size 64 --threads 1
    python scripts/benchmark_winograd.py nets --net SmallInception --batch-size 64 --threads 1
    python scripts/benchmark_winograd.py errors
"""

import argparse
import random
import time
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import mkldnn

from project import models
from project.compression.winograd.choice import WinogradChooser, relative_errors
from project.compression.winograd.convolution import TILES, WinogradConv2d, count_multiplications, why_not_winograd
from project.deployment.engines import engines, why_missing
from project.learning.process import tune_process

NETS = {
    "SmallInception": (1, 28, 28),
    "GoogLeNet": (3, 224, 224),
    "BNGoogLeNet": (3, 224, 224),
    "InceptionV3": (3, 299, 299),
}
"""The shape of each net's images."""
VGG = [(64, 112, 128), (128, 56, 256), (256, 28, 256), (64, 56, 64), (128, 28, 128), (512, 14, 512)]
"""Channels, side and output channels of layers of nets that have only 3x3 convolutions."""

Layer = tuple[int, int, int, int, int]
"""Channels, height, width, output channels and padding of a layer."""
Times = dict[str, list[float]]


def layers_of(name: str) -> list[Layer]:
    """Each distinct 3x3 convolution of stride 1, in the order in which the net runs them."""
    if name == "VGG":
        return [(channels, side, side, out_channels, 1) for channels, side, out_channels in VGG]
    found: dict[Layer, None] = {}
    net_class, image_shape = getattr(models, name), NETS[name]

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(layer, nn.Conv2d) and why_not_winograd(layer) is None:
            channels, height, width = args[0].shape[1:]
            found[channels, height, width, layer.out_channels, int(layer.padding[0])] = None

    with torch.device("meta"):
        net = net_class(10, image_shape).eval()
        for layer in net.modules():
            layer.register_forward_pre_hook(note)
        net(torch.empty(1, *image_shape))
    return list(found)


def make(layer: Layer, batch_size: int) -> tuple[nn.Conv2d, Tensor]:
    """A convolution of this size, and random input maps that are never negative, as after a ReLU."""
    channels, height, width, out_channels, padding = layer
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out_channels, 3, padding=padding).to(memory_format=torch.channels_last).eval()
    x = torch.randn(batch_size, channels, height, width).relu_().contiguous(memory_format=torch.channels_last)
    return conv, x


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, budget_s: float) -> Times:
    """Times in milliseconds. An untimed call comes before each timed one.

    The measurement ends after ``rounds`` rounds, or earlier if three rounds are done and ``budget_s`` seconds are over.
    """
    times: Times = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > budget_s:
            break
        for name in random.sample(list(runs), len(runs)):
            runs[name]()
            begin = time.perf_counter()
            runs[name]()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def quantile(samples: list[float], share: float) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(share))


def compare_layer(layer: Layer, batch_size: int, rounds: int, budget_s: float) -> str:
    conv, x = make(layer, batch_size)
    packed, packed_x = mkldnn.to_mkldnn(deepcopy(conv)), x.to_mkldnn()
    forms = {f"f{tile}": WinogradConv2d.of(conv, tile) for tile in TILES}
    runs: dict[str, Callable[[], object]] = {"direct": partial(conv, x), "packed": partial(packed, packed_x)}
    runs |= {name: partial(form, x) for name, form in forms.items()}
    times = take_turns(runs, rounds, budget_s)
    best = min(("direct", "packed"), key=lambda name: quantile(times[name], 0.5))
    channels, height, width, out_channels, padding = layer
    sides = height + 2 * padding - 2, width + 2 * padding - 2
    macs = count_multiplications(*sides, channels, out_channels, None)
    cells = [f"{channels} → {out_channels}, {height}x{width}", f"{macs / 1e6:.1f}"]
    cells += [f"{quantile(times[name], 0.5):.3g}" for name in ("direct", "packed")]
    cells.append(f"{2 * batch_size * macs / quantile(times[best], 0.5) / 1e6:.0f}")
    for tile in TILES:
        ratios = [one / other for one, other in zip(times[best], times[f"f{tile}"], strict=True)]
        fewer = macs / count_multiplications(*sides, channels, out_channels, tile)
        low, middle, high = (quantile(ratios, share) for share in (0.05, 0.5, 0.95))
        cells += [f"{quantile(times[f'f{tile}'], 0.5):.3g}", f"{middle:.2f} ({low:.2f} to {high:.2f}) of {fewer:.2f}"]
    return f"| {' | '.join(cells)} |"


def compare_net(name: str, batch_size: int, rounds: int, budget_s: float, names: list[str]) -> None:
    """Compare eager PyTorch, with the Winograd layers that ``auto`` chooses, with engines that run the original net."""
    net_class, image_shape = getattr(models, name), NETS[name]
    torch.manual_seed(0)
    net = net_class(10, image_shape).eval()
    images = torch.randn(batch_size, *image_shape)
    fast = deepcopy(net).to(memory_format=torch.channels_last)
    plan = WinogradChooser(batch_size=batch_size, rounds=rounds, budget_s=budget_s / 20).plan(fast, images)
    plan.surgery.apply_(fast)
    own = engines(net, image_shape, [engine for engine in names if not why_missing(engine)])
    chosen = [f"{list(plan.surgery.tiles.values()).count(tile)} f{tile}" for tile in TILES]
    title = f"eager, {', '.join(chosen)} of {len(plan.rows)}"
    own[title] = engines(fast, image_shape, ["eager"])["eager"]
    runs = {engine: partial(run, images) for engine, run in own.items()}
    for run in runs.values():
        run()
    for engine, samples in take_turns(runs, rounds, budget_s).items():
        low, middle, high = (quantile(samples, share) for share in (0.05, 0.5, 0.95))
        print(f"| {name} | {batch_size} | {engine} | {middle:.4g} | {low:.4g} to {high:.4g} |", flush=True)  # noqa: T201


def compare_errors() -> None:
    for channels in (1, 3, 8, 16, 32, 64, 128, 256, 448):
        errors = [relative_errors(*make((channels, side, side, 32, 1), 4)) for side in (7, 14, 28, 57)]
        cells = [f"{min(own):.2f} to {max(own):.2f}" for own in ([error[tile] for error in errors] for tile in TILES)]
        print(f"| {channels} | {' | '.join(cells)} |")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "nets", "errors"], help="what to compare: times or rounding errors")
    parser.add_argument("--net", default="GoogLeNet", choices=[*NETS, "VGG"], help="net to measure; VGG: layers only")
    parser.add_argument("--batch-size", type=int, default=64, help="number of images in a batch")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_argument("--rounds", type=int, default=25, help="largest number of measurements")
    parser.add_argument(
        "--budget", type=float, default=5.0, help="time limit in seconds for a layer or a net, after three rounds"
    )
    parser.add_argument("--engines", nargs="+", default=["eager", "onnxruntime"], help="engines for the original net")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*torch.jit.*")  # torch.utils.mkldnn uses it
    torch.set_num_threads(args.threads)
    tune_process()  # as every verb of the project does
    with torch.inference_mode():
        if args.what == "errors":
            compare_errors()
        elif args.what == "nets":
            compare_net(args.net, args.batch_size, args.rounds, args.budget, args.engines)
        else:
            for layer in layers_of(args.net):
                print(compare_layer(layer, args.batch_size, args.rounds, args.budget), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
