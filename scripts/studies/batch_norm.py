"""Batch norm: what it does to the loss landscape, the learning rate and the gradients of deep nets.

Ioffe & Szegedy 2015 (arXiv:1502.03167); Santurkar et al. 2018 (arXiv:1805.11604, fig. 4). The nets are plain stacks of
convolutions as in the second paper (VGG), with batch norm and without any norm, and the small Inception. The study of
the savings has what batch norm does to decay, dropout and L2.

    python scripts/studies/batch_norm.py
"""

import math
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from evidence import Study, Trained, accuracies, best_of, by, options
from pages import draw_seeds
from plain_nets import PlainStack, large_normal_
from torch import nn
from verdicts import Claim, clearly, mean, spread, verdict

from project.data import FashionMNIST
from project.metrics.probes import gradient_norms
from project.models import BatchNorm, NoNorm, ReLU

NORMS = {"BatchNorm": "with batch norm", "NoNorm": "without norm"}
PATHS = [f"project.models.{name}" for name in NORMS]
RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
DEPTHS = [5, 10, 20, 40]
NETS = {"PlainStack": "plain_nets.PlainStack", "SmallInception": "project.models.SmallInception"}
WIDTHS: dict[str, dict[str, Any]] = {"PlainStack": {"depth": 8, "width": 32}, "SmallInception": {"width": 0.5}}
IOFFE, SANTURKAR = "Ioffe & Szegedy 2015, sec. {}", "Santurkar et al. 2018, {}"
NORM, RATE = "model.net.init_args.norm", "model.optimizer.init_args.lr"
MEASURES = {
    "loss_range": "range of the loss along the gradient",
    "gradient_change": "largest change of the gradient along it",
    "smoothness": "effective β-smoothness",
}


def config(net: str = "PlainStack", epochs: int = 10, **changes: Any) -> dict[str, Any]:
    """A run on Fashion-MNIST with batches of 128. An epoch has 25 steps only, so that progress is seen in detail."""
    return {
        "data": {"class_path": "project.data.FashionMNIST", "init_args": {"batch_size": 128}},
        "model": {
            "net": {"class_path": NETS[net], "init_args": WIDTHS[net]},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03, "momentum": 0.9}},
        },
        "trainer": {"max_epochs": epochs, "limit_train_batches": 25, "limit_val_batches": 1, **changes},
    }


# -- claims 1 to 3 ----------------------------------------------------------------------------------------------------


def landscape(study: Study, rate: float) -> dict[tuple[str, str, str], list[list[float]]]:
    """Claims 1 to 3: the three measures of figure 4 of Santurkar et al. in training.

    Returns:
        For each net, norm and measure, the values of all probed steps, one row a seed.
    """
    distances = [rate * factor for factor in (0.5, 1.0, 2.0, 4.0)]  # the paper's range of step sizes
    probe = {
        "class_path": "project.callbacks.LandscapeProbe",
        "init_args": {"every_n_steps": 10, "distances": distances, "num_images": 512},
    }
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for net in NETS:
        base = config(net, 6, callbacks=[probe])
        base["model"]["optimizer"]["init_args"]["lr"] = rate
        for (norm,), runs in by(study.grid(f"landscape_{net}", base, {NORM: PATHS}), NORM).items():
            for run in runs:
                for measure, values in measures_of(run).items():
                    found.setdefault((net, norm, measure), []).append(values)
    claims = {
        "loss_range": Claim("the loss varies less along the gradient", SANTURKAR.format("fig. 4a")),
        "gradient_change": Claim("gradients are more predictive", SANTURKAR.format("fig. 4b")),
        "smoothness": Claim("the effective β-smoothness is better", SANTURKAR.format("fig. 4c")),
    }
    study.head("The loss landscape in training")
    study.say(
        f"""Every 10 steps of the first 150, on 512 training images, at points of the step sizes
        {", ".join(f"{distance:g}" for distance in distances)} along the gradient. The learning rate is {rate:g} for
        both nets, the best one without norm. The table has the share of these steps at which batch norm is lower by
        more than two standard deviations over the seeds, and the median factor between the two. All of this is on a
        logarithmic scale. A claim holds for a net if that is so at more than half of the steps."""
    )
    rows = []
    for measure, claim in claims.items():
        signs, texts = [], []
        for net in NETS:
            share, factor = separation(found[net, "NoNorm", measure], found[net, "BatchNorm", measure])
            signs.append(1 if share > 0.5 else 0)
            steps = f"{100 * share:.0f} % of the steps"
            texts.append(f"{net}: lower by two standard deviations at {steps}, median factor {factor:.3g}")
            rows.append([MEASURES[measure], net, f"{100 * share:.0f} %", f"{factor:.3g}"])
        study.find(claim, verdict(signs), "; ".join(texts))
    study.show(["measure", "net", "steps at which batch norm is lower by two sd", "median factor"], rows)
    for (net, norm, measure), series in found.items():
        medians = [statistics.median(values) if values else math.nan for values in series]
        study.note(f"landscape, median {measure}", f"{net}, {norm}", medians)
    return found


def measures_of(run: Trained) -> dict[str, list[float]]:
    """The three measures of a run, each a number for each probed step."""
    names = ("loss", "loss_min", "loss_max", "gradient_change_max", "smoothness")
    loss, low, high, change, smoothness = (run.series(f"probe/landscape/{name}")[1] for name in names)
    ranges = [max(here, up) - min(here, down) for here, down, up in zip(loss, low, high, strict=True)]
    return {"loss_range": ranges, "gradient_change": change, "smoothness": smoothness}


def separation(higher: Sequence[Sequence[float]], lower: Sequence[Sequence[float]]) -> tuple[float, float]:
    """How far two arms lie apart on a logarithmic scale, step by step.

    Args:
        higher: arm that should have the larger values, one row a seed.
        lower: arm that should have the smaller values, one row a seed.

    Returns:
        The share of the steps at which the means differ by more than two standard deviations (the root mean square of
        both arms' deviations), and the median over the steps of the factor between the means.
    """
    apart, factors = [], []
    for above, below in zip(zip(*higher, strict=True), zip(*lower, strict=True), strict=True):
        logs = [[math.log10(max(value, 1e-12)) for value in values] for values in (above, below)]
        difference = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
        deviation = math.sqrt(statistics.fmean([statistics.variance(each) if len(each) > 1 else 0.0 for each in logs]))
        apart.append(difference > 2 * deviation)
        factors.append(10**difference)
    return (sum(apart) / len(apart), statistics.median(factors)) if apart else (math.nan, math.nan)


# -- claim 4 ----------------------------------------------------------------------------------------------------------


def learning_rates(study: Study) -> dict[tuple[Any, ...], list[Trained]]:
    """Claim 4: the same number of steps at seven learning rates. Returns the runs by norm and rate."""
    runs = study.grid("learning_rates", config(), {NORM: PATHS, RATE: RATES[1:]})
    # the lowest rate apart: it was added later, because the best rate without norm is low
    groups = by([*study.grid("lowest_rate", config(), {NORM: PATHS, RATE: RATES[:1]}), *runs], NORM, RATE)
    best = best_rates(groups)
    top = mean(accuracies(groups["NoNorm", best["NoNorm"]]))
    largest = {
        norm: [
            max((rate for rate in RATES if groups[norm, rate][number].measured() >= top / 2), default=RATES[0])
            for number in range(len(study.args.seeds))
        ]
        for norm in NORMS
    }
    steps = {norm: [steps_to(run, 0.9 * top) for run in groups[norm, best[norm]]] for norm in NORMS}
    signs = [
        1 if min(largest["BatchNorm"]) > max(largest["NoNorm"]) else 0,
        clearly(steps["NoNorm"], steps["BatchNorm"]),
    ]
    study.find(
        Claim("larger initial rates do not diverge, and converge in fewer steps", IOFFE.format("3.3, 4.2.1")),
        verdict(signs),
        f"""with batch norm every seed trains at rates up to {min(largest["BatchNorm"]):g}, without norm the seeds
        train up to {min(largest["NoNorm"]):g} to {max(largest["NoNorm"]):g}; at the best rate of each
        ({best["BatchNorm"]:g} and {best["NoNorm"]:g}) {90 * top:.1f} % of the validation images are classified
        correctly after {spread(steps["BatchNorm"], 0)} steps with and {spread(steps["NoNorm"], 0)} without""",
    )
    study.head("Learning rates")
    study.say(
        f"""A stack of 8 convolutions with 32 channels, Fashion-MNIST, 250 steps of 128 images, SGD with momentum 0.9,
        constant rate. The numbers are test accuracies in percent after the last step. A rate trains if its accuracy is
        at least half of the best one without norm ({100 * top:.1f} %). The first half of the claim holds if batch norm
        trains, with every seed, at a larger rate than any seed without. The second half looks for nine tenths of that
        accuracy ({90 * top:.1f} %) on 1,000 validation images after every 25 steps."""
    )
    for norm in NORMS:
        if best[norm] in (RATES[0], RATES[-1]):
            study.say(f"A better rate {NORMS[norm]} may lie outside the rates that were tried.")
    rows = [[f"{rate:g}", *(spread(accuracies(groups[norm, rate]), 1, 100) for norm in NORMS)] for rate in RATES]
    study.show(["learning rate", *NORMS.values()], rows)
    study.record("learning rate", {f"{norm}, {rate:g}": groups[norm, rate] for norm in NORMS for rate in RATES})
    return groups


def best_rates(groups: dict[tuple[Any, ...], list[Trained]]) -> dict[str, float]:
    """The best rate of each norm."""
    return {norm: best_of({rate: groups[norm, rate] for rate in RATES}) for norm in NORMS}


def steps_to(run: Trained, accuracy: float) -> float:
    """The number of training steps until the validation accuracy is reached; NaN if it never is."""
    steps, values = run.series("val/accuracy")
    return next((float(step + 1) for step, value in zip(steps, values, strict=True) if value >= accuracy), math.nan)


# -- claims 5 and 6 ---------------------------------------------------------------------------------------------------


def deep_gradients(study: Study) -> dict[tuple[str, str, int], list[float]]:
    """Claims 5 and 6: how the gradient of the first convolution grows or falls with depth, before training.

    Returns:
        For each case, norm and depth: the decimal logarithm of the norm of this gradient, one number a seed.
    """
    data = FashionMNIST()
    images, labels = data.load(train=True)
    batch = data.normalize(images[:256].float().div(255))
    cases: dict[str, dict[str, Any]] = {
        "sigmoid, Xavier's start": {"activation": nn.Sigmoid, "weight_init": nn.init.xavier_normal_},
        "ReLU, He's start": {"activation": ReLU},
        "ReLU, twice He's start": {"activation": ReLU, "weight_init": large_normal_},
    }
    norms = {"BatchNorm": BatchNorm, "NoNorm": NoNorm}
    found: dict[tuple[str, str, int], list[float]] = {}
    for case, norm, depth in product(cases, NORMS, DEPTHS):
        for seed in study.args.seeds:
            torch.manual_seed(seed)
            net = PlainStack(10, (1, 28, 28), depth=depth, width=32, norm=norms[norm], **cases[case])
            nn.functional.cross_entropy(net(batch), labels[:256]).backward()
            convs = [value for name, value in gradient_norms(net).items() if name.endswith("conv")]
            size = math.log10(max(convs[0], 1e-37))
            found.setdefault((case, norm, depth), []).append(size)
        study.note(f"gradients, {case}", f"{norm}, depth {depth}", found[case, norm, depth])
    study.head("Gradients of deep nets")
    study.say(
        """Decimal logarithm of the norm of the first convolution's gradient, on 256 images before training. A case
        vanishes or explodes if, without norm, the norm is less than a hundredth of that at depth 5, or more than a
        hundred times as large, at depth 20. The claim is reproduced if it changes clearly less with batch norm, and if
        no gradient changes more than a hundredfold from depth 5 to 40 with batch norm."""
    )
    rows = [
        [case, NORMS[norm], *(spread(found[case, norm, depth], 1) for depth in DEPTHS)]
        for case, norm in product(cases, NORMS)
    ]
    study.show(["case", "norm", *(f"depth {depth}" for depth in DEPTHS)], rows)

    def growth(case: str, norm: str, depth: int) -> list[float]:
        return [deep - flat for deep, flat in zip(found[case, norm, depth], found[case, norm, 5], strict=True)]

    for name, sign in (("vanish", -1), ("explode", 1)):
        signs, texts = [], []
        for case in cases:
            plain, normed = growth(case, "NoNorm", 20), growth(case, "BatchNorm", 20)
            if sign * mean(plain) > 2:
                signs.append(clearly([abs(value) for value in plain], [abs(value) for value in normed]))
                texts.append(
                    f"{case}: from depth 5 to 20 times 10^{mean(normed):.1f} with batch norm and 10^{mean(plain):.1f}"
                    " without"
                )
        worst = max((sign * mean(growth(case, "BatchNorm", 40)), case) for case in cases)
        if worst[0] > 2:
            signs.append(-1)
            texts.append(f"but {worst[1]} with batch norm, from depth 5 to 40: times 10^{sign * worst[0]:.1f}")
        study.find(
            Claim(f"gradients do not {name} with depth", IOFFE.format("1, 3.3")),
            verdict(signs),
            "; ".join(texts) or "no case without norm does so at depth 20",
        )
    return found


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(figure: Any, study: Study, found: dict[Any, Any], rates: dict[Any, Any], deep: dict[Any, Any]) -> None:
    """Six panels: the three measures of the plain stack, the learning rates, and gradients of two cases by depth."""
    axes = figure.subplots(2, 3).ravel()
    for panel, (measure, title) in zip(axes, MEASURES.items(), strict=False):
        for color, norm in zip(("C0", "C1"), NORMS, strict=True):
            rows = found["PlainStack", norm, measure]
            draw_seeds(panel, [10 * number for number in range(len(rows[0]))], rows, NORMS[norm], color)
        panel.set(yscale="log", xlabel="training step", ylabel=title)
    for color, norm in zip(("C0", "C1"), NORMS, strict=True):
        rows = [[100 * rates[norm, rate][seed].measured() for rate in RATES] for seed in range(len(study.args.seeds))]
        draw_seeds(axes[3], RATES, rows, NORMS[norm], color)
    axes[3].set(xscale="log", xlabel="learning rate", ylabel="test accuracy after 250 steps (%)")
    for panel, case in zip(axes[4:], ("sigmoid, Xavier's start", "ReLU, twice He's start"), strict=True):
        for color, norm in zip(("C0", "C1"), NORMS, strict=True):
            rows = list(zip(*(deep[case, norm, depth] for depth in DEPTHS), strict=True))
            draw_seeds(panel, DEPTHS, rows, NORMS[norm], color)
        panel.set(xlabel="number of convolutions", ylabel="log10 of the first layer's gradient norm", title=case)
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study("batch_norm", "What batch norm does", options(__doc__, arguments), "metrics/probes")
    torch.set_num_threads(1)
    groups = learning_rates(study)
    claim_4 = study.findings.pop()  # its runs come first, because they give the rate of the others
    found = landscape(study, best_rates(groups)["NoNorm"])
    study.findings.append(claim_4)
    deep = deep_gradients(study)
    study.head("What was scaled down")
    study.say(
        """Santurkar et al. train VGG on CIFAR-10 for 15,000 steps; here it is a stack of 8 convolutions on
        Fashion-MNIST for 150 steps. Ioffe & Szegedy train Inception on ImageNet. The rates are those of a grid with a
        step of about three. Without norm the accuracies at rates near divergence depend on the processor, because a
        difference in the last digit of one step grows. The best rate without norm can change with them.
        [Another study](batch_norm_savings.md) has the decay of the rate, dropout and L2."""
    )
    study.write(
        lambda figure: draw(figure, study, found, groups, deep),
        "Above: the three measures of the landscape of the plain stack. Below: test accuracy against the learning rate,"
        " and the first layer's gradient in deep stacks before training. Thin lines are single seeds, strong lines"
        " the means of the seeds that did not diverge.",
        size=(12.0, 7.0),
    )


if __name__ == "__main__":
    main()
