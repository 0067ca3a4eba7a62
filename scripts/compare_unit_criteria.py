"""Compares the criteria for pruned units on one net: Fashion-MNIST, one step of pruning, a short fine-tuning.

For each seed a dense net is trained, and another one with the penalty of Network Slimming. Each criterion prunes a copy
in one step, down to the same multiply-accumulates, and the copy trains on, with the same batches for all criteria. The
test accuracy is measured before and after this training.

    python scripts/compare_unit_criteria.py

It writes docs/unit_criteria.md. A finished row is in the CSV file beside the page, and is not computed again. Dense
nets are kept in the folder of logs.
"""

import argparse
import copy
import csv
import shlex
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path

import torch
from torch import nn
from unit_training import SHAPE, WRAP, Data, accuracy, append_row, fit_, spread

from project.compression import NormScaleL1, Pruner, plan_thinning, removed_units
from project.compression.pruning import pruner as pruning
from project.compression.pruning.saliency import saliency_of_units
from project.deployment.table import markdown_line
from project.frame.environment import cpu_model
from project.frame.paths import Paths
from project.learning import Muon
from project.metrics.complexity import count_macs
from project.models import SmallInception

ROOT = Path(__file__).resolve().parents[1]

CRITERIA = {
    "magnitude": "mean of the absolute weights that make or read the unit",
    "magnitude, own weights": "the same without the weights that read the unit",
    "l2": "Euclidean norm of the weights that make or read the unit",
    "lamp": "LAMP of the squared Euclidean norm",
    "geometric_median": "sum of the distances to the weights of the other units",
    "norm_scale": "absolute scale of the norm",
    "norm_scale, slimmed": "the same, of a net that was trained with `NormScaleL1`",
    "gradient": "absolute mean over images of the gradient of the unit's gate",
    "gradient_sum": "sum over the unit's weights of the absolute product of weight and mean gradient",
    "taylor": "mean over images of the squared gradient of the unit's gate",
    "obd": "half of the same with labels drawn from the net's prediction",
    "random": "random numbers",
}
"""The rows of the table, each with its definition."""


@dataclass(frozen=True)
class Row:
    """One criterion with one seed.

    Args:
        setting: the options that belong to every row, in words.
        criterion: key of :data:`CRITERIA`.
        seed: seed of the net, of the batches and of the criterion.
        share: share of the multiply-accumulates that was to be pruned.
        macs: share of them that is left.
        dense, before, after: test accuracy of the dense net, and of the pruned net before and after its training.
    """

    setting: str
    criterion: str
    seed: int
    share: float
    macs: float
    dense: float
    before: float
    after: float


def train_(net: nn.Module, data: Data, epochs: int, lr: float, seed: int, penalty: nn.Module | None = None) -> None:
    """Train a net in place with Muon."""
    weights, others = ([each for each in net.parameters() if (each.dim() > 1) is wide] for wide in (True, False))
    optimizer = Muon([{"params": weights}, {"params": others, "weight_decay": 0.0}], lr=lr, weight_decay=0.05)
    fit_(net, data, epochs, optimizer, seed, penalty)


def dense_net(args: argparse.Namespace, data: Data, seed: int, slimmed: bool) -> nn.Module:
    """A trained dense net, from the folder of logs if it is there."""
    torch.manual_seed(seed)
    net = SmallInception(10, SHAPE, width=args.width)
    name = f"{args.width:g}_{args.images}_{args.epochs}_{seed}{f'_{args.strength:g}' * slimmed}.pt"
    path = Paths().logs / "unit_criteria" / name
    if not path.exists():
        train_(net, data, args.epochs, 0.05, seed, NormScaleL1(args.strength) if slimmed else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path))
    return net


def pruned(net: nn.Module, criterion: str, share: float, num_images: int, data: Data, seed: int) -> nn.Module:
    """A copy of the net without the units that matter least, with ``1 - share`` of its multiply-accumulates."""
    name, _, variant = criterion.partition(", ")
    pruner = Pruner("units", name, budget="macs", round_to=4, keep=0.1)
    groups = pruner.groups(net, SHAPE)
    if variant == "own weights":
        pruning.saliency_of_units = lambda net, units, *rest: saliency_of_units(
            net,
            {
                layer: replace(each, slices={key: value for key, value in each.slices.items() if key not in each.read})
                for layer, each in units.items()
            },
            *rest,
        )
    images, labels = (each[:num_images] for each in data.train)
    masks = pruner.prune(net, groups, {}, share, images=images, labels=labels, seed=seed, image_shape=SHAPE)
    pruning.saliency_of_units = saliency_of_units
    thin = copy.deepcopy(net)
    plan_thinning(net, removed_units(groups, masks), SHAPE).apply_(thin)
    return thin


def measure(args: argparse.Namespace, path: Path) -> None:
    """Add the rows that the file does not have yet."""
    done = {(row.share, row.seed, row.criterion) for row in read_rows(path) if row.setting == setting_of(args)}
    data = Data(args.images)
    dense: dict[tuple[int, bool], tuple[nn.Module, float]] = {}
    for share, seed, criterion in product(args.shares, args.seeds, args.criteria):
        if (share, seed, criterion) in done:
            continue
        kind = (seed, criterion.endswith("slimmed"))
        if kind not in dense:
            net = dense_net(args, data, *kind)
            dense[kind] = net, accuracy(net, data)
        net, whole = dense[kind]
        thin = pruned(net, criterion, share, args.gradient_images, data, seed)
        before = accuracy(thin, data)
        train_(thin, data, args.finetune, 0.02, seed + 1000)
        macs = count_macs(thin, SHAPE) / count_macs(net, SHAPE)
        row = Row(setting_of(args), criterion, seed, share, macs, whole, before, accuracy(thin, data))
        print(row, flush=True)  # noqa: T201
        append_row(row, path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                line["setting"],
                line["criterion"],
                int(line["seed"]),
                *(float(line[each]) for each in ("share", "macs", "dense", "before", "after")),
            )
            for line in csv.DictReader(file)
        ]


def setting_of(args: argparse.Namespace) -> str:
    """The options that belong to every row, in words."""
    return (
        f"{args.images} training images, width {args.width:g}, epochs {args.epochs} and {args.finetune}, "
        f"gradients of {args.gradient_images} images, penalty {args.strength:g}"
    )


def to_markdown(rows: Sequence[Row], args: argparse.Namespace, command: str) -> str:
    """The page.

    Args:
        rows: finished rows of one setting.
        args: options of the command.
        command: the command that makes this page.
    """
    cpu, version = cpu_model() or "unknown processor", torch.__version__.partition("+")[0]
    lines = [
        "<!-- room: compression/pruning -->",
        "# Which criterion for pruned units",
        "",
        *textwrap.wrap(
            f"`{command}`, {date.today()}, {cpu}, one thread, torch {version}. The numbers of each seed are in"
            " [unit_criteria.csv](unit_criteria.csv).",
            **WRAP,
        ),
        "",
        *textwrap.wrap(
            f"Fashion-MNIST, {args.images:,} of its 60,000 training images, all 10,000 test images. The net is the"
            f" small Inception with {args.width:g} of its width, trained for {args.epochs} epochs. One step of pruning"
            f" (`budget: macs`, `scope: global`, `round_to: 4`, `keep: 0.1`) follows, then {args.finetune} more"
            f" {'epoch' if args.finetune == 1 else 'epochs'}. All criteria of a seed start from the same dense net and"
            " see the same batches, but for the slimmed net, which was trained with `NormScaleL1` (strength"
            f" {args.strength:g}). Gradients are those of {args.gradient_images} images. ± is the standard deviation"
            " over the seeds.",
            **WRAP,
        ),
    ]
    for share in sorted({row.share for row in rows}):
        lines += ["", f"## {100 * share:g} % fewer multiply-accumulates", "", *_table(rows, share), ""]
        lines += textwrap.wrap(_winner(rows, share), **WRAP)
    lines += [
        "",
        "## What the table does not say",
        "",
        "- One data set, one small net and a short training, few seeds. After a longer training, on other nets and at",
        "  other sizes the order may be another one.",
        "- Before the training on, nearly all accuracy is gone, and the numbers differ more by seed than by criterion.",
        "- The test images rank the criteria, so the best row is slightly too good.",
        "- Multiply-accumulates are equal in all rows, up to one step of the widths. Latency may differ, because the",
        "  criteria remove channels in different layers.",
        "- The penalty has one strength. Network Slimming trains far longer with it, until many scales are zero.",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], share: float) -> list[str]:
    """A line for each criterion, the most accurate first."""
    head = ("criterion", "what the score is", "left", "before, %", "after, %", "after, against magnitude", "seeds")
    lines = [markdown_line(head), markdown_line(["---"] * len(head))]
    for name, mine in _by_accuracy(rows, share).items():
        difference = _differences(rows, share, name, "magnitude")
        cells = [
            f"`{name.partition(', ')[0]}`{name[len(name.partition(', ')[0]) :]}",
            CRITERIA[name],
            f"{100 * statistics.mean(row.macs for row in mine):.0f} %",
            spread([100 * row.before for row in mine]),
            spread([100 * row.after for row in mine]),
            "" if name == "magnitude" else spread(difference, sign="+"),
            str(len(mine)),
        ]
        lines.append(markdown_line(cells))
    dense = [row.dense for row in rows if row.criterion == "magnitude" and row.share == share]
    lines.append(
        markdown_line(["dense net", "", "100 %", "", spread([100 * each for each in dense]), "", f"{len(dense)}"])
    )
    return lines


def _winner(rows: Sequence[Row], share: float) -> str:
    """The best criterion, and those that these seeds do not tell from it."""
    names = list(_by_accuracy(rows, share))
    near = []
    for name in names[1:]:
        difference = _differences(rows, share, name, names[0])
        error = statistics.stdev(difference) / len(difference) ** 0.5 if len(difference) > 1 else float("inf")
        if -statistics.mean(difference) < 2 * error:
            near.append(f"`{name}`")
    if not near:
        return f"`{names[0]}` is the most accurate, by more than two standard errors of the difference."
    return (
        f"`{names[0]}` is the most accurate. Less than two standard errors of the difference behind it:"
        f" {', '.join(near)}."
    )


def _by_accuracy(rows: Sequence[Row], share: float) -> dict[str, list[Row]]:
    """The rows of each criterion, the most accurate criterion first."""
    found = {name: [row for row in rows if row.criterion == name and row.share == share] for name in CRITERIA}
    mean = {name: statistics.mean(row.after for row in mine) for name, mine in found.items() if mine}
    return {name: found[name] for name in sorted(mean, key=lambda name: -mean[name])}


def _differences(rows: Sequence[Row], share: float, name: str, other: str) -> list[float]:
    """The difference of two criteria's accuracies after the training, in points, for each seed that has both."""
    after = {(row.criterion, row.seed): 100 * row.after for row in rows if row.share == share}
    return [after[name, seed] - after[other, seed] for key, seed in after if key == name and (other, seed) in after]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, with a dense net each")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA, help="rows of the table")
    parser.add_argument("--images", type=int, default=20_000, help="number of training images")
    parser.add_argument("--width", type=float, default=0.5, help="factor on the widths of the small Inception")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the dense net")
    parser.add_argument("--finetune", type=int, default=1, help="epochs after the pruning")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.6], help="shares of the multiply-accumulates to prune"
    )
    parser.add_argument("--gradient-images", type=int, default=512, help="images that gradients are taken of")
    parser.add_argument("--strength", type=float, default=3e-3, help="strength of the penalty of Network Slimming")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/unit_criteria.md", help="the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.output.with_suffix(".csv")
    measure(args, path)
    rows = [row for row in read_rows(path) if row.setting == setting_of(args)]
    command = shlex.join(["python", "scripts/compare_unit_criteria.py", *sys.argv[1:]])
    args.output.write_text(to_markdown(rows, args, command))


if __name__ == "__main__":
    main()
