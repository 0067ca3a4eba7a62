"""Batch size: time to converge, test accuracy, sharp and flat minimizers, learning rates, the linear scaling rule.

Keskar et al. 2017 (arXiv:1609.04836); Goyal et al. 2017 (arXiv:1706.02677); Masters & Luschi 2018 (arXiv:1804.07612).

    python scripts/studies/batch_size.py
"""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from evidence import Study, Trained, accuracies, best_of, by, options
from pages import draw_seeds
from plain_nets import ConvThenLinear
from torch import nn
from verdicts import Claim, clearly, mean, spread, verdict

from project.models import BatchNorm

BATCHES = [16, 64, 256, 1024, 4096]
RATES = [0.01, 0.04, 0.16, 0.64, 2.56, 10.24]
"""The batches and the rates have the same step of 4, so that the linear scaling rule stays on the grid."""
EPOCHS, LONG, WARM_UP, IMAGES = 20, 80, 2, 4100
"""Epochs of a run, of a long run with large batches, and of the warm-up; number of training images."""
LARGE = [256, 1024]
"""Batch sizes for the linear scaling rule."""
BATCH, RATE = "data.init_args.batch_size", "model.optimizer.init_args.lr"
EPSILONS = [1e-3, 5e-4]
Groups = dict[tuple[Any, ...], list[Trained]]


def config() -> dict[str, Any]:
    """A run on 4,100 images of Fashion-MNIST, with plain SGD, so that the batch size is the only source of noise."""
    sharpness = {
        "class_path": "project.callbacks.SharpnessProbe",
        "init_args": {"epsilons": EPSILONS, "num_images": 1024, "mode": "train"},
    }
    return {
        "data": {
            "class_path": "project.data.FashionMNIST",
            "init_args": {"batch_size": 16, "val_fraction": 1 - IMAGES / 60_000},
        },
        "model": {
            "net": {"class_path": "plain_nets.ConvThenLinear", "init_args": {"norm": "project.models.BatchNorm"}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
            "schedule": {"class_path": "project.learning.Linear", "init_args": {"warmup_epochs": 0.0}},
        },
        "trainer": {"max_epochs": EPOCHS, "limit_val_batches": 2, "callbacks": [sharpness]},
    }


def convergence(study: Study, groups: Groups, best: dict[int, float]) -> None:
    """Claim 1: seconds and epochs until the accuracy that the full batch has at its end."""
    full = groups[BATCHES[-1], best[BATCHES[-1]]]
    target = min(run.last("val/accuracy") for run in full)
    seconds, epochs = {}, {}
    for batch in BATCHES:
        runs = groups[batch, best[batch]]
        epochs[batch] = [epochs_to(run, target) for run in runs]
        seconds[batch] = [run.seconds / EPOCHS * count for run, count in zip(runs, epochs[batch], strict=True)]
    fastest = min(BATCHES[:-1], key=lambda batch: mean(seconds[batch]))
    study.find(
        Claim("mini-batches converge in less time than full batches", "Masters & Luschi 2018, sec. 1"),
        verdict([clearly(seconds[BATCHES[-1]], seconds[fastest])]),
        f"""{100 * target:.1f} % on validation images, which the full batch has at its end, take
        {spread(seconds[fastest], 1)} s with batches of {fastest} and {spread(seconds[BATCHES[-1]], 1)} s with the full
        batch of {BATCHES[-1]:,}, each at its best rate""",
    )
    study.head("Time to converge")
    study.say(
        f"""The time until a net classifies {100 * target:.1f} % of 2,000 validation images correctly. This is the
        lowest accuracy at the end of the full batch over the seeds. Each batch size has its best rate."""
    )
    rows = [[str(each), f"{best[each]:g}", spread(epochs[each], 1), spread(seconds[each], 1)] for each in BATCHES]
    study.show(["batch size", "learning rate", "epochs", "seconds of training"], rows)


def epochs_to(run: Trained, accuracy: float) -> float:
    """The number of epochs until the validation accuracy is reached; NaN if it never is."""
    values = run.series("val/accuracy")[1]
    return next((float(epoch) for epoch, value in enumerate(values, 1) if value >= accuracy), math.nan)


def fixed_rate(study: Study, groups: Groups, best: dict[int, float]) -> float:
    """Claims 2 and 3: test accuracy and sharpness by batch size at one rate. Returns the rate."""
    small, large = BATCHES[0], BATCHES[-2]
    rate = best[small]
    base = config()
    base["data"]["init_args"]["batch_size"] = large
    base["trainer"]["max_epochs"] = LONG
    long = study.grid("long", base, {RATE: [rate]})
    runs = {f"{batch:,}": groups[batch, rate] for batch in BATCHES} | {f"{large:,}, {LONG} epochs": long}
    first, others = f"{small}", [f"{large:,}", f"{large:,}, {LONG} epochs"]
    tests = {name: spread(accuracies(group), 2, 100) for name, group in runs.items()}
    study.find(
        Claim("small batches test better at a fixed rate", "Keskar et al. 2017, table 2"),
        verdict([clearly(accuracies(runs[first]), accuracies(runs[other])) for other in others]),
        f"""rate {rate:g}: {tests[first]} % with batches of {small}, {tests[others[0]]} with {large:,}, and
        {tests[others[1]]} with {large:,} after {LONG} epochs in place of {EPOCHS}""",
    )
    sharp = {
        (name, eps): [run.last(f"probe/train/sharpness/{eps:g}") for run in group]
        for name, group in runs.items()
        for eps in EPSILONS
    }
    study.find(
        Claim("small batches end in flat, large in sharp minimizers", "Keskar et al. 2017, table 3, metric 2.1"),
        verdict([clearly(sharp[other, eps], sharp[first, eps]) for other in others for eps in EPSILONS]),
        f"rate {rate:g}, sharpness of batches of {small}, of {large:,}, and of {large:,} after {LONG} epochs: "
        + "; ".join(
            f"ε = {eps:g}: {', '.join(spread(sharp[name, eps]) for name in (first, *others))}" for eps in EPSILONS
        ),
    )
    study.head("One rate for all batch sizes")
    study.say(
        f"""The rate begins at {rate:g}, the best one of batches of {small}. All runs have {EPOCHS} epochs, but one
        group has {LONG}: after so few steps a large batch is far from a minimum. Sharpness is metric 2.1 of Keskar et
        al. in the full space, on 1,024 training images, with batch norm in training mode. With batch norm the loss does
        not depend on the scale of the weights, and larger weights look flatter. Small batches take more steps, and
        their weights may be larger in the end. This study does not tell the two effects apart (Dinh et al. 2017)."""
    )
    study.show(
        ["batch size", "test accuracy, %", *(f"sharpness, ε = {eps:g}" for eps in EPSILONS), "training loss"],
        [
            [
                name,
                tests[name],
                *(spread(sharp[name, eps]) for eps in EPSILONS),
                spread([run.last("train/loss") for run in group], 4),
            ]
            for name, group in runs.items()
        ],
    )
    for (name, eps), values in sharp.items():
        study.note(f"sharpness {eps:g}", f"{name}, {rate:g}", values)
    study.record("long", {f"{large}, {rate:g}": long})
    return rate


def best_rates(study: Study, groups: Groups, best: dict[int, float]) -> None:
    """Claim 4: the best rate by batch size."""
    order = [best[batch] for batch in BATCHES]
    signs = [1 if later >= earlier else -1 for earlier, later in pairwise(order)]
    signs.append(1 if order[-1] > order[0] else -1)
    study.find(
        Claim("small batches want small rates, large batches large ones", "Masters & Luschi 2018, sec. 5"),
        verdict(signs),
        "; ".join(f"best rate of batches of {batch}: {best[batch]:g}" for batch in BATCHES),
    )
    study.head("All rates")
    study.say(
        """Test accuracy in percent. The best rate of a batch size has the best accuracy on 5,000 validation images, so
        it need not be the best of its column. The claim is reproduced if the best rate never falls from one batch
        size to the next, and the last one is larger than the first."""
    )
    rows = [[f"{rate:g}", *(spread(accuracies(groups[batch, rate]), 1, 100) for batch in BATCHES)] for rate in RATES]
    study.show(["learning rate", *(f"batch {batch:,}" for batch in BATCHES)], rows)


def linear_scaling(study: Study, groups: Groups, rate: float) -> None:
    """Claim 5: the rate of the smallest batches times the factor of the batch size, with warm-up and without."""
    small = BATCHES[0]
    whole = accuracies(groups[small, rate])
    rows, signs, texts = [[f"batch {small}, rate {rate:g}", spread(whole, 2, 100), ""]], [], []
    for large in LARGE:
        scaled = rate * large / small
        warm = config()
        warm["model"]["schedule"]["init_args"]["warmup_epochs"] = WARM_UP
        warm["data"]["init_args"]["batch_size"] = large
        warmed = study.grid(f"warm_up_{large}", warm, {RATE: [scaled]})
        study.record("warm-up", {f"{large}, {scaled:g}": warmed})
        arms = {f"batch {large:,}, rate {rate:g}": accuracies(groups[large, rate])}
        if scaled in RATES:
            arms[f"batch {large:,}, scaled rate {scaled:g}"] = accuracies(groups[large, scaled])
        arms[f"batch {large:,}, scaled rate {scaled:g}, warm-up"] = accuracies(warmed)
        gaps = {name: [100 * (a - b) for a, b in zip(whole, values, strict=True)] for name, values in arms.items()}
        rows += [[name, spread(values, 2, 100), spread(gaps[name])] for name, values in arms.items()]
        gap, *_, left = gaps.values()
        signs.append(min(clearly(gap, left), int(mean(left) < mean(gap) / 4)))
        texts.append(f"to {large:,}: {spread(gap)} points at the same rate, {spread(left)} with the rule and warm-up")
    study.find(
        Claim("the linear scaling rule closes the gap, with warm-up", "Goyal et al. 2017, sec. 2, table 1"),
        verdict(signs),
        f"gap in test accuracy from batches of {small} {'; '.join(texts)}",
    )
    study.head("The linear scaling rule")
    study.say(
        f"""The warm-up takes {WARM_UP} of the {EPOCHS} epochs. The gap is the test accuracy of batches of {small} minus
        that of the setting. The rule closes it if the gap is clearly smaller, and less than a quarter is left.
        The largest rate is one at which no batch size trains without warm-up: there the rule is tested beyond the rates
        of this net."""
    )
    study.show(["setting", "test accuracy, %", "gap, points"], rows)


def throughput(study: Study) -> dict[int, list[list[float]]]:
    """Claim 6: images a second of a training step by batch size, with one thread and with all, interleaved.

    Returns:
        For each number of threads, one row a round with the images a second of each batch size.
    """
    threads = sorted({1, torch.get_num_threads()})
    rounds = 2 if study.args.miniature else 7
    sizes = BATCHES[:4]
    net = ConvThenLinear(10, (1, 28, 28), norm=BatchNorm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    images, labels = torch.randn(max(sizes), 1, 28, 28), torch.randint(0, 10, (max(sizes),))
    found: dict[int, list[list[float]]] = {count: [] for count in threads}
    for _ in range(rounds):
        for count in threads:
            torch.set_num_threads(count)
            row = []
            for size in sizes:
                steps = max(1, 2048 // size)
                start = time.perf_counter()
                for _ in range(steps):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(net(images[:size]), labels[:size]).backward()
                    optimizer.step()
                row.append(steps * size / (time.perf_counter() - start))
            found[count].append(row)
    torch.set_num_threads(threads[-1])
    ratios = {
        (count, size): [row[place] / row[0] for row in found[count][1:]]
        for count in threads
        for place, size in enumerate(sizes)
    }
    most = threads[-1]
    smallest, *larger = zip(*found[most][1:], strict=True)
    study.find(
        Claim("with the right rate larger batches train faster on parallel hardware", "Goyal et al. 2017, sec. 5.5"),
        verdict([clearly(column, smallest) for column in larger]),
        f"""images a second with {most} threads, over batches of {sizes[0]}: """
        + "; ".join(f"batches of {size:,}: {spread(ratios[most, size])} times" for size in sizes[1:])
        + f"; with one thread batches of {sizes[-1]:,}: {spread(ratios[1, sizes[-1]])} times",
    )
    study.head("Images a second")
    study.say(
        f"""Training steps of the same net, {rounds - 1} interleaved rounds after one that does not count. ± is over the
        rounds. The brackets have the ratio to batches of {sizes[0]}. A batch size counts as faster if
        the difference is above two standard errors over the rounds. These are speeds and not times
        to an accuracy, which are in the first table. A processor of two cores is little parallel: a GPU would show far
        more."""
    )
    rows = []
    for count in threads:
        columns = zip(sizes, zip(*found[count][1:], strict=True), strict=True)
        rows.append(
            [str(count), *(f"{spread(column, 0)} ({mean(ratios[count, size]):.2f})" for size, column in columns)]
        )
    study.show(["threads", *(f"batch {size:,}" for size in sizes)], rows)
    return found


def draw(figure: Any, study: Study, groups: Groups, rate: float) -> None:
    """Accuracy against the rate for each batch size; accuracy and sharpness against the batch size at one rate."""
    axes = figure.subplots(1, 3)
    numbers = range(len(study.args.seeds))
    for color, batch in enumerate(BATCHES):
        rows = [[100 * groups[batch, each][number].measured() for each in RATES] for number in numbers]
        draw_seeds(axes[0], RATES, rows, f"batch {batch:,}", f"C{color}")
    axes[0].set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)")
    rows = [[100 * groups[batch, rate][number].measured() for batch in BATCHES] for number in numbers]
    draw_seeds(axes[1], BATCHES, rows, f"rate {rate:g}", "C0")
    axes[1].set(xscale="log", xlabel="batch size (images)", ylabel="test accuracy (%)")
    for color, eps in enumerate(EPSILONS):
        rows = [
            [groups[batch, rate][number].last(f"probe/train/sharpness/{eps:g}") for batch in BATCHES]
            for number in numbers
        ]
        draw_seeds(axes[2], BATCHES, rows, f"ε = {eps:g}", f"C{color}")
    axes[2].set(xscale="log", xlabel="batch size (images)", ylabel="sharpness (metric 2.1)")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study("batch_size", "What the batch size does", options(__doc__, arguments), "metrics/probes")
    groups = by(study.grid("grid", config(), {BATCH: BATCHES, RATE: RATES}), BATCH, RATE)
    best = {batch: best_of({rate: groups[batch, rate] for rate in RATES}) for batch in BATCHES}
    convergence(study, groups, best)
    rate = fixed_rate(study, groups, best)
    best_rates(study, groups, best)
    linear_scaling(study, groups, best[BATCHES[0]])
    throughput(study)
    study.record("grid", {f"{batch}, {each:g}": groups[batch, each] for batch in BATCHES for each in RATES})
    study.head("What was scaled down")
    study.say(
        f"""{IMAGES:,} training images of Fashion-MNIST, so that a full batch fits into memory (it is 4,096 of them). A
        net of two convolutions and a hidden linear layer, with batch norm; {EPOCHS} epochs for every batch size; plain
        SGD whose rate falls linearly to 0. So a full batch makes {EPOCHS} steps in all, and batch norm's running
        averages know little of its last net. Keskar et al. train until the loss is flat; Goyal et al. train ResNet-50
        on ImageNet."""
    )
    study.write(
        lambda figure: draw(figure, study, groups, rate),
        f"Left: test accuracy against the learning rate for each batch size. Middle and right: test accuracy and"
        f" sharpness at the rate {rate:g}. Thin lines are single seeds, strong lines their means.",
        size=(13.0, 4.0),
    )


if __name__ == "__main__":
    main()
