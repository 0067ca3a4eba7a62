"""Compares the project's unit pruning with Torch-Pruning's after fine-tuning: four nets, two sizes, Fashion-MNIST.

For each seed a dense net is trained. Each arm removes units from a copy until a half or a quarter of the
multiply-accumulates is left, and the copy trains on, with the same batches for all arms. Then the test accuracy is
measured, and the latency of the nets of the first seed in ONNX Runtime.

    python scripts/compare_unit_pruners.py --jobs 2

It needs ``pip install torch-pruning`` and writes docs/unit_pruners.md. A finished row is in the CSV file beside the
page, and is not computed again. Dense nets and ONNX files are kept in the folder of logs.
"""

import argparse
import copy
import csv
import math
import multiprocessing
import re
import shlex
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import MobileNetV2, ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock
from unit_training import SHAPE, WRAP, Data, accuracy, append_row, fit_, spread

from project.compression import Pruner, plan_thinning, removed_units
from project.deployment import latency
from project.deployment.onnx_file import export_onnx, onnx_engine
from project.deployment.table import markdown_line
from project.frame.environment import cpu_model
from project.frame.paths import Paths
from project.metrics.complexity import count_macs, count_parameters
from project.models import SmallInception

ROOT = Path(__file__).resolve().parents[1]
ROUND_TO, KEEP = 4, 0.1
ARMS = {
    "taylor": "ours, `taylor`",
    "obd": "ours, `obd`",
    "tp_magnitude": "Torch-Pruning, `GroupMagnitudeImportance(p=2)`",
    "tp_taylor": "Torch-Pruning, `GroupTaylorImportance()`",
}
"""The rows of a point. The names of Torch-Pruning's begin with ``tp_``."""
BATCHES, BLOCKS = (1, 64), 5


def inception() -> nn.Module:
    return SmallInception(10, SHAPE, width=0.5)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with a third of its width; one stride of 2 less, for small images."""
    net: Any = MobileNetV2(num_classes=10, width_mult=0.35)
    net.features[0][0] = nn.Conv2d(1, net.features[0][0].out_channels, 3, 2, 1, bias=False)
    net.features[2].conv[1][0].stride = (1, 1)
    return net


class NarrowResNet(ResNet):
    """ResNet-10 with widths from 12 to 96, and a stem for small images."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=10)
        self.inplanes = width = 12
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        for number in range(4):
            layer = self._make_layer(BasicBlock, width * 2**number, 1, stride=1 if number == 0 else 2)
            setattr(self, f"layer{number + 1}", layer)
        self.fc = nn.Linear(width * 8, 10)


def vit() -> nn.Module:
    """A ViT of 3 blocks with 4 heads, 64 channels and 16 patches."""
    net = VisionTransformer(28, 7, 3, 4, 64, 128, num_classes=10)
    net.conv_proj = nn.Conv2d(1, 64, 7, 7)
    return net


def sgd(net: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.1 * rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(net: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), 0.003 * rate, weight_decay=0.05)


NETS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[nn.Module, float], torch.optim.Optimizer]]] = {
    "mobilenet_v2": ("MobileNetV2, 0.35 of its width", mobilenet_v2, sgd),
    "vit": ("ViT, 3 blocks, 64 channels", vit, adamw),
    "resnet10": ("ResNet-10, 12 to 96 channels", NarrowResNet, sgd),
    "inception": ("small Inception, 0.5 of its width", inception, sgd),
}
"""Title, maker and optimizer of each net, the most expensive first."""
LONGER = {"vit": 3}
"""Factor on the epochs of a net that learns slowly."""


@dataclass(frozen=True)
class Row:
    """One arm at one point with one seed.

    Args:
        setting: the options that belong to every row, in words.
        net: key of :data:`NETS`.
        share: share of the multiply-accumulates that was to be removed.
        arm: key of :data:`ARMS`.
        seed: seed of the net, of the batches and of the criterion.
        macs, parameters: shares of them that are left.
        dense, after: test accuracy of the dense net, and of the smaller net after its training.
        seconds: duration of removal, training and test.
        failure: the exception that ended the row; empty if none did.
    """

    setting: str
    net: str
    share: float
    arm: str
    seed: int
    macs: float
    parameters: float
    dense: float
    after: float
    seconds: float
    failure: str = ""


@dataclass(frozen=True)
class Time:
    """The latency of one net of the first seed, as a share of the dense net's.

    Args:
        setting, net, share, arm: as in :class:`Row`.
        batch: number of images.
        ms: median in milliseconds over all rounds' blocks.
        ratio, deviation: mean and standard deviation, over the blocks of rounds, of the median over the dense net's.
    """

    setting: str
    net: str
    share: float
    arm: str
    batch: int
    ms: float
    ratio: float
    deviation: float


def train_(net: nn.Module, name: str, data: Data, epochs: int, rate: float, seed: int) -> None:
    net.to(memory_format=torch.channels_last)
    fit_(net, data, epochs * LONGER.get(name, 1), NETS[name][2](net, rate), seed, memory_format=torch.channels_last)


def folder_of(args: argparse.Namespace) -> Path:
    return Paths().logs / "unit_pruners" / re.sub(r"\W+", "_", setting_of(args))


def dense_net(args: argparse.Namespace, name: str, data: Data, seed: int) -> nn.Module:
    """A trained dense net, from the folder of logs if it is there."""
    torch.manual_seed(seed)
    net = NETS[name][1]()
    path = Paths().logs / "unit_pruners" / f"{name}_{args.images}_{args.epochs}_{seed}.pt"
    if not path.exists():
        train_(net, name, data, args.epochs, 1.0, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path))
    return net.eval()


def ours(net: nn.Module, criterion: Any, share: float, args: argparse.Namespace, data: Data, seed: int) -> nn.Module:
    """A copy without the units that are worth least, removed in ``args.steps`` steps with scores of their own."""
    thin = copy.deepcopy(net)
    dense = count_macs(net, SHAPE)
    images, labels = (each[: args.gradient_images] for each in data.train)
    pruner = Pruner("units", criterion, budget="macs", round_to=ROUND_TO, keep=KEEP)
    widths = {group.layer: group.units.num for group in pruner.groups(net, SHAPE) if group.units is not None}
    for step in range(1, args.steps + 1):
        amount = 1 - dense * (1 - share) ** (step / args.steps) / count_macs(thin, SHAPE)
        if amount > 0:
            groups = pruner.groups(thin, SHAPE)
            options: Any = {"images": images, "labels": labels, "seed": seed, "image_shape": SHAPE, "widths": widths}
            masks = pruner.prune(thin, groups, {}, amount, **options)
            plan_thinning(thin, removed_units(groups, masks), SHAPE).apply_(thin)
    return thin


def theirs(net: nn.Module, criterion: str, share: float, args: argparse.Namespace, data: Data) -> nn.Module:
    """A copy that Torch-Pruning has pruned over all layers in many small steps, until the budget is reached.

    Gradients are taken anew before each step. Near the budget the copy is counted after each group that a step prunes,
    so that the last step does not remove more than it has to. A ViT is treated as in the package's own example for
    torchvision: the output projections of attention follow its inputs, and ``hidden_dim`` is set after a step.
    """
    import torch_pruning as tp

    net = copy.deepcopy(net)
    dense = left = count_macs(net, SHAPE)
    target = (1 - share) * dense
    images, labels = (each[: args.gradient_images] for each in data.train)
    ignored = [[each for each in net.modules() if isinstance(each, nn.Linear | nn.Conv2d)][-1]]
    ignored += [each.out_proj for each in net.modules() if isinstance(each, nn.MultiheadAttention)]
    taylor = criterion == "tp_taylor"
    importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        net, torch.zeros(1, *SHAPE), importance=importance, global_pruning=True, pruning_ratio=1.0,
        max_pruning_ratio=1 - KEEP, iterative_steps=args.their_steps, round_to=ROUND_TO, ignored_layers=ignored,
    )  # fmt: skip
    for _ in range(args.their_steps):
        if taylor:
            net.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
        is_close = left < target + 0.15 * dense  # counts take most of the time, and a step removes less than this
        for group in pruner.step(interactive=True):
            group.prune()
            if isinstance(net, VisionTransformer):
                net.hidden_dim = net.conv_proj.out_channels
            if is_close and count_macs(net, SHAPE) <= target:
                net.zero_grad()
                return net
        left = count_macs(net, SHAPE)
        if left <= target:
            return net
    raise RuntimeError(f"{left / dense:.0%} of the multiply-accumulates are left after {args.their_steps} steps")


def onnx_path(args: argparse.Namespace, name: str, share: float = 0.0, arm: str = "dense") -> Path:
    return folder_of(args) / f"{name}_{100 * share:g}_{arm}.onnx"


def begin_process() -> None:
    """Settings of a process that measures."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it would use sizes of attention from before the removal
    warnings.filterwarnings("ignore", module="torch_pruning")


def measure(args: argparse.Namespace, name: str, seed: int, path: Path) -> None:
    """Add the rows of a net and a seed that the file does not have yet."""
    points = (args.net_shares, args.arms)
    done = {(row.share, row.arm) for row in rows_of(args, path) if (row.net, row.seed) == (name, seed)}
    if not set(product(*points)) - done:
        return
    data = Data(args.images, args.test_images)
    net = dense_net(args, name, data, seed)
    whole, macs, parameters = accuracy(net, data), count_macs(net, SHAPE), count_parameters(net)
    if seed == args.seeds[0]:
        folder_of(args).mkdir(parents=True, exist_ok=True)
        export_onnx(net, onnx_path(args, name), SHAPE)
    for share, arm in product(*points):
        if (share, arm) in done:
            continue
        start, key = time.monotonic(), (setting_of(args), name, share, arm, seed)
        try:
            is_ours = not arm.startswith("tp_")
            thin = ours(net, arm, share, args, data, seed) if is_ours else theirs(net, arm, share, args, data)
            train_(thin, name, data, args.finetune, 0.5, seed + 1000)
            if seed == args.seeds[0]:
                export_onnx(thin, onnx_path(args, name, share, arm), SHAPE)
            left = count_macs(thin, SHAPE) / macs, count_parameters(thin) / parameters
            row = Row(*key, *left, whole, accuracy(thin, data), time.monotonic() - start)
        except Exception as error:
            if arm in ("taylor", "obd"):
                raise
            failure = f"{type(error).__name__}: {error}".splitlines()[0][:150]
            row = Row(*key, math.nan, math.nan, whole, math.nan, time.monotonic() - start, failure)
        print(row, flush=True)  # noqa: T201
        append_row(row, path)


def measure_latency(args: argparse.Namespace, name: str, path: Path) -> None:
    """Add the latencies of a net's ONNX files, if the file does not have them yet."""
    torch.set_num_threads(1)
    files = {(share, arm): onnx_path(args, name, share, arm) for share, arm in product(args.net_shares, args.arms)}
    files = {(0.0, "dense"): onnx_path(args, name)} | {key: file for key, file in files.items() if file.exists()}
    if {(row.share, row.arm) for row in times_of(args, path) if row.net == name} >= set(files):
        return
    engines = {f"{share} {arm}": onnx_engine(file) for (share, arm), file in files.items()}
    blocks = [
        latency.measure(engines, SHAPE, batch_sizes=BATCHES, rounds=args.rounds, seed=block) for block in range(BLOCKS)
    ]
    for (share, arm), batch in product(files, BATCHES):
        medians = [block[f"{share} {arm}", batch].median_ms for block in blocks]
        ratios = [own / block["0.0 dense", batch].median_ms for own, block in zip(medians, blocks, strict=True)]
        spread_of = (statistics.median(medians), statistics.mean(ratios), statistics.stdev(ratios))
        append_row(Time(setting_of(args), name, share, arm, batch, *spread_of), path)


def read(kind: Any, path: Path) -> list[Any]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    types: dict[str, Any] = {each.name: each.type for each in fields(kind)}
    with path.open(newline="") as file:
        return [kind(**{name: to(line[name]) for name, to in types.items()}) for line in csv.DictReader(file)]


def rows_of(args: argparse.Namespace, path: Path) -> list[Row]:
    return [row for row in read(Row, path) if row.setting == setting_of(args)]


def times_of(args: argparse.Namespace, path: Path) -> list[Time]:
    return [row for row in read(Time, path) if row.setting == setting_of(args)]


def setting_of(args: argparse.Namespace) -> str:
    """The options that belong to every row, in words."""
    return (
        f"{args.images} and {args.test_images} images, epochs {args.epochs} and {args.finetune}, gradients of"
        f" {args.gradient_images} images, steps {args.steps} and {args.their_steps}"
    )


def verdict(mine: Sequence[float], other: Sequence[float]) -> str:
    """Whether accuracies are better than others, by the root mean square of the two standard deviations."""
    if not mine or not other:
        return "alone" if mine else "fails"
    deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in (mine, other)]
    deviation = math.hypot(*deviations) / 2**0.5
    difference = statistics.mean(mine) - statistics.mean(other)
    if abs(difference) <= deviation:
        return "within one standard deviation"
    return "better" if difference > 0 else "worse"


def best(after: Mapping[str, Sequence[float]], peer: bool) -> str | None:
    """The arm of one side with the largest mean accuracy; none if all its rows failed."""
    arms = [arm for arm, values in after.items() if values and arm.startswith("tp_") is peer]
    return max(arms, key=lambda arm: statistics.mean(after[arm]), default=None)


def to_markdown(rows: Sequence[Row], times: Sequence[Time], args: argparse.Namespace, command: str) -> str:
    """The page.

    Args:
        rows: finished rows of one setting.
        times: the latencies.
        args: options of the command.
        command: the command that makes this page.
    """
    cpu, torch_version = cpu_model() or "unknown processor", torch.__version__.partition("+")[0]
    try:
        peer = f"Torch-Pruning {version('torch-pruning')}"
    except PackageNotFoundError:
        peer = "Torch-Pruning"
    seeds = len({row.seed for row in rows})
    points = sorted({(list(NETS).index(row.net), row.share) for row in rows})
    body, verdicts = [], []
    for number, share in points:
        name = list(NETS)[number]
        found = [row for row in rows if (row.net, row.share) == (name, share)]
        after = {arm: [row.after for row in found if row.arm == arm and not row.failure] for arm in ARMS}
        mine, other = best(after, peer=False), best(after, peer=True)
        of_best, of_taylor = (
            verdict(after[arm] if arm else [], after[other] if other else []) for arm in (mine, "taylor")
        )
        verdicts.append((NETS[name][0], share, mine, other, after, of_best, of_taylor))
        body += ["", f"## {NETS[name][0]}, {100 * share:g} % fewer multiply-accumulates", ""]
        body += _table(found, [each for each in times if each.net == name], share, {mine, other})
    num_good = sum(each[5] in ("better", "within one standard deviation", "alone") for each in verdicts)
    lines = [
        "<!-- room: compression/pruning -->",
        "# Unit pruning beside Torch-Pruning",
        "",
        *textwrap.wrap(
            f"`{command}`, {date.today()}, {cpu}, one thread, torch {torch_version}, {peer}. The numbers of each seed"
            " are in [unit_pruners.csv](unit_pruners.csv).",
            **WRAP,
        ),
        "",
        *textwrap.wrap(
            f"Fashion-MNIST at 28 pixels, {args.images:,} of its 60,000 training images, {args.test_images:,} test"
            f" images, {seeds} {'seed' if seeds == 1 else 'seeds'}. The dense nets train for {args.epochs} epochs,"
            " SGD with momentum for the convolutional nets and AdamW for the ViT. Units are removed, and"
            f" {args.finetune} more epochs follow with half of the rate; the ViT has {LONGER['vit']} times as many of"
            " both. All arms of a seed start from the same dense net and see the same batches."
            f" Both rank all layers together, keep at least {100 * KEEP:g} % of each, round widths to"
            f" {ROUND_TO}, keep the classifier, take gradients of the same {args.gradient_images} images, and stop at"
            " the first step at which the budget is met. The project's scores are divided by the multiply-accumulates"
            f" that a unit saves (`budget: macs`), and units go in {args.steps}"
            f" {'step' if args.steps == 1 else 'steps'}, with new scores at each. Torch-Pruning"
            f" removes units in steps of {100 / args.their_steps:g} % of all channels, with new scores at each step."
            " Both are counted by the same counter. ± is the standard deviation over the seeds.",
            **WRAP,
        ),
        "",
        "## Ours against theirs",
        "",
        *textwrap.wrap(
            f"By the best of two criteria on each side, ours is better or within one standard deviation at {num_good}"
            f" of {len(verdicts)} points. The standard deviation is the root mean square of the two sides'.",
            **WRAP,
        ),
        "",
        markdown_line(
            ("net", "fewer MACs", "ours, %", "Torch-Pruning, %", "best against best", "`taylor` against best")
        ),
        markdown_line(["---"] * 6),
    ]
    for title, share, mine, other, after, of_best, of_taylor in verdicts:
        sides = [
            f"{spread([100 * value for value in after[arm]])} ({ARMS[arm].split('`')[1]})" if arm else "fails"
            for arm in (mine, other)
        ]
        lines.append(markdown_line((title, f"{100 * share:g} %", *sides, of_best, of_taylor)))
    short = [
        max(
            (1 - row.share - row.macs for row in rows if row.arm.startswith("tp_") is is_peer and not row.failure),
            default=0,
        )
        for is_peer in (False, True)
    ]
    uneven = (
        f"- Widths go in steps of {ROUND_TO}. Ours stops at most {100 * short[0]:.1f} % of the dense net's"
        f" multiply-accumulates below the budget, Torch-Pruning {100 * short[1]:.1f} %: the width of the ViT's residual"
        " stream is one large step."
    )
    lines += [*body, "", "## What the table does not say", "", NOTES]
    lines += textwrap.wrap(uneven, subsequent_indent="  ", **WRAP)
    return "\n".join(lines) + "\n"


NOTES = """- One data set of small grey images, small nets and short trainings. Larger sizes and longer trainings may
  order them differently.
- The best of two criteria is chosen by the test images, so that both sides look slightly too good. The last column
  takes one criterion of ours against the best of theirs.
- Torch-Pruning ranks by the score alone, as its examples do. A user can add a cost to its scores.
- Torch-Pruning keeps the number of heads of `nn.MultiheadAttention` and makes them narrower with the width of the
  network. Ours also removes whole heads.
- The learning rates were chosen for the dense nets, by hand, before the comparison, and were tuned for neither side.
- With the same multiply-accumulates, nets differ in parameters and latency, because they keep different layers wide.
- Latencies are those of the first seed's nets. Their ± is over blocks of interleaved rounds on one machine."""


def _table(rows: Sequence[Row], times: Sequence[Time], share: float, marked: set[str | None]) -> list[str]:
    """A line for each arm of a point and one for the dense net; the best arm of each side is bold."""
    head = ("", "accuracy, %", "MACs left", "parameters left", *(f"time, batch of {batch}" for batch in BATCHES))
    lines = [markdown_line(head), markdown_line(["---"] * len(head))]
    dense = {row.seed: 100 * row.dense for row in rows}
    milliseconds = [
        f"{each.ms:.2f} ms" for batch in BATCHES for each in times if (each.arm, each.batch) == ("dense", batch)
    ]
    lines.append(markdown_line(("dense", spread(list(dense.values())), "100 %", "100 %", *milliseconds)))
    for arm, title in ARMS.items():
        mine = [row for row in rows if row.arm == arm and not row.failure]
        failures = sorted({row.failure for row in rows if row.arm == arm and row.failure})
        found = {each.batch: each for each in times if (each.share, each.arm) == (share, arm)}
        if mine:
            cells = [
                spread([100 * row.after for row in mine]),
                *(f"{spread([100 * getattr(row, key) for row in mine], digits=1)} %" for key in ("macs", "parameters")),
                *(
                    f"{found[batch].ratio:.2f} ± {found[batch].deviation:.2f}" if batch in found else ""
                    for batch in BATCHES
                ),
            ]
            cells[0] = f"**{cells[0]}**" if arm in marked else cells[0]
            cells[0] += f" ({len(mine)} seeds; others: {'; '.join(failures)})" if failures else ""
        elif failures:
            cells = [f"fails: {'; '.join(failures)}".replace("|", "/"), "", "", "", ""]
        else:
            continue
        lines.append(markdown_line((title, *cells)))
    return lines


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS, help="nets of the table")
    made.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="rows of each point")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, with a dense net each")
    made.add_argument(
        "--net-shares", type=float, nargs="+", default=[0.5, 0.75], help="shares of the multiply-accumulates to remove"
    )
    made.add_argument("--images", type=int, default=10_000, help="number of training images, 128 or more")
    made.add_argument("--test-images", type=int, default=10_000, help="number of test images")
    made.add_argument("--epochs", type=int, default=8, help="epochs of the dense nets")
    made.add_argument("--finetune", type=int, default=4, help="epochs after the removal")
    made.add_argument("--gradient-images", type=int, default=256, help="images that gradients are taken of")
    made.add_argument("--steps", type=int, default=4, help="steps of ours to the budget, with new scores at each")
    made.add_argument("--their-steps", type=int, default=100, help="steps of Torch-Pruning to a net without channels")
    made.add_argument("--rounds", type=int, default=10, help=f"rounds in each of {BLOCKS} blocks of latencies")
    made.add_argument("--jobs", type=int, default=1, help="number of processes with a thread each, 1 or more")
    made.add_argument("--output", type=Path, default=ROOT / "docs/unit_pruners.md", help="the page")
    return made


def main() -> None:
    args = parser().parse_args()
    path = args.output.with_suffix(".csv")
    times = args.output.with_name(f"{args.output.stem}_latency.csv")
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), begin_process) as pool:
        jobs = [pool.submit(measure, args, name, seed, path) for seed, name in product(args.seeds, args.nets)]
        for job in jobs:
            job.result()
    for name in args.nets:
        measure_latency(args, name, times)
    command = shlex.join(["python", "scripts/compare_unit_pruners.py", *sys.argv[1:]])
    rows = [row for row in rows_of(args, path) if row.net in args.nets]
    args.output.write_text(to_markdown(rows, times_of(args, times), args, command))


if __name__ == "__main__":
    main()
