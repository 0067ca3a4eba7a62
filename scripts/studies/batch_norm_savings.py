"""What batch norm makes unnecessary: slow decay of the learning rate, dropout and L2.

Ioffe & Szegedy 2015 (arXiv:1502.03167, sec. 4.2.1) take them away from Inception as soon as it has batch norm. This
study looks for the three claims where they have a chance: a net with a hidden linear layer, few images, many epochs.

    python scripts/studies/batch_norm_savings.py
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from evidence import Study, Trained, accuracies, best_of, by, options
from pages import draw_seeds
from verdicts import Claim, clearly, spread, verdict

NETS = {"without norm": "NoNorm", "with batch norm": "BatchNorm"}
PLAIN, NORMED = NETS
RATES = [0.01, 0.03, 0.1, 0.3]
EPOCHS, IMAGES = 24, 1_000
NET, RATE = "model.net", "model.optimizer.init_args.lr"
IOFFE = "Ioffe & Szegedy 2015, sec. {}"


def config() -> dict[str, Any]:
    """A run on 1,000 images of Fashion-MNIST, which the net can learn by heart."""
    return {
        "data": {
            "class_path": "project.data.FashionMNIST",
            "init_args": {"batch_size": 64, "val_fraction": 1 - IMAGES / 60_000},
        },
        "model": {
            "net": {"class_path": "plain_nets.ConvThenLinear"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03, "momentum": 0.9}},
            "schedule": {"class_path": "project.learning.Linear"},
        },
        "trainer": {"max_epochs": EPOCHS, "limit_val_batches": 5, "observe": False},
    }


def net_of(name: str, dropout: float = 0.0) -> dict[str, Any]:
    """The net of a name, as in YAML."""
    arguments = {"norm": f"project.models.{NETS[name]}", "fc_dropout": dropout}
    return {"class_path": "plain_nets.ConvThenLinear", "init_args": arguments}


def best_rates(study: Study) -> dict[str, float]:
    """The best of four rates for each net, without dropout and L2, with linear decay."""
    groups = by(study.grid("rates", config(), {NET: {name: net_of(name) for name in NETS}, RATE: RATES}), NET, RATE)
    study.record("rates", {f"{name}, {rate:g}": groups[name, rate] for name, rate in groups})
    study.head("Learning rates")
    study.say(
        """Test accuracy in percent, without dropout and L2. The rate falls linearly to 0. The best rate has the best
        validation accuracy; the other parts of the page use it."""
    )
    best = {name: best_of({rate: groups[name, rate] for rate in RATES}) for name in NETS}
    rows = [
        [name, *(spread(accuracies(groups[name, rate]), 1, 100) for rate in RATES), f"{best[name]:g}"] for name in NETS
    ]
    study.show(["net", *(f"rate {rate:g}" for rate in RATES), "best rate"], rows)
    return best


def on_every_net(
    study: Study, arm: str, base: dict[str, Any], rates: dict[str, float], key: str, values: Sequence[float]
) -> dict[Any, list[Trained]]:
    """Train each net at its best rate with each value of a key.

    Returns:
        The runs by net and value. Each has one run a seed.
    """
    groups: dict[Any, list[Trained]] = {}
    for rate in dict.fromkeys(rates.values()):
        base["model"]["optimizer"]["init_args"]["lr"] = rate
        nets = {name: net_of(name) for name in NETS if rates[name] == rate}
        groups |= by(study.grid(f"{arm}_{rate:g}", base, {NET: nets, key: values}), NET, key)
    return groups


def compare(study: Study, part: str, claim: Claim, groups: dict[Any, list[Trained]], steps: dict[float, float]) -> None:
    """A verdict on a claim that batch norm makes a change of one value cheap.

    Args:
        study: study that gets the verdict and a table.
        part: name of the value, for the table.
        claim: the claim.
        groups: runs by net and value.
        steps: the values that may be usual, each with the one that should do with batch norm. Without norm the best of
            them by validation accuracy is the usual one.
    """
    values = list(dict.fromkeys([*steps, *steps.values()]))
    usual = best_of({value: groups[PLAIN, value] for value in steps})
    costs, rows = {}, []
    for name in NETS:
        arms = [accuracies(groups[name, value]) for value in (usual, steps[usual])]
        costs[name] = [100 * (before - after) for before, after in zip(*arms, strict=True)]
        cells = (spread(accuracies(groups[name, value]), 2, 100) for value in values)
        rows.append([name, *cells, f"{usual:g} to {steps[usual]:g}", spread(costs[name])])
    needed = clearly(costs[PLAIN], [0.0] * len(costs[PLAIN]))
    study.find(
        claim,
        verdict([min(needed, clearly(costs[PLAIN], costs[NORMED]))]),
        f"""{part} {steps[usual]:g} in place of {usual:g} costs {spread(costs[NORMED])} points of test accuracy with
        batch norm and {spread(costs[PLAIN])} without""",
    )
    study.show(["net", *(f"{part} {value:g}" for value in values), "change", "cost in points"], rows)
    study.record(part, {f"{name}, {value:g}": runs for (name, value), runs in groups.items()})


def decay(study: Study, rates: dict[str, float]) -> dict[Any, list[Trained]]:
    """Claim 1: the rate falls six times as fast."""
    study.head("Decay of the learning rate")
    study.say(
        """The rate falls after every second epoch, to 0.85 of its value or six times as fast (0.85 to the power of 6 is
        0.377). The numbers are test accuracies in percent."""
    )
    base = config()
    milestones = [*range(2, EPOCHS, 2)]
    base["model"]["schedule"] = {"class_path": "project.learning.Steps", "init_args": {"milestones": milestones}}
    groups = on_every_net(study, "decay", base, rates, "model.schedule.init_args.gamma", [0.85, 0.377])
    claim = Claim("the rate can decay faster (six times, as in the paper)", IOFFE.format("4.2.1"))
    compare(study, "factor", claim, groups, {0.85: 0.377})
    return groups


def dropout(study: Study, rates: dict[str, float]) -> dict[Any, list[Trained]]:
    """Claim 2: the net is trained without dropout."""
    study.head("Dropout")
    study.say("Dropout before both linear layers. The numbers are test accuracies in percent.")
    groups: dict[Any, list[Trained]] = {}
    for rate in dict.fromkeys(rates.values()):
        base = config()
        base["model"]["optimizer"]["init_args"]["lr"] = rate
        names = [(name, value) for name in NETS if rates[name] == rate for value in (0.0, 0.25, 0.5)]
        nets = {f"{name}, {value:g}": net_of(name, value) for name, value in names}
        runs = by(study.grid(f"dropout_{rate:g}", base, {NET: nets}), NET)
        groups |= {(name, value): runs[f"{name}, {value:g}",] for name, value in names}
    compare(study, "dropout", Claim("dropout can go", IOFFE.format("3.4, 4.2.1")), groups, {0.25: 0.0, 0.5: 0.0})
    return groups


def weight_decay(study: Study, rates: dict[str, float]) -> dict[Any, list[Trained]]:
    """Claim 3: a fifth of the L2."""
    study.head("L2")
    study.say("Weight decay of SGD, which is L2. The numbers are test accuracies in percent.")
    strengths = [2e-2, 4e-3, 8e-4, 1.6e-4]
    groups = on_every_net(study, "l2", config(), rates, "model.optimizer.init_args.weight_decay", strengths)
    claim = Claim("L2 can shrink (to a fifth, as in the paper)", IOFFE.format("4.2.1"))
    compare(study, "L2", claim, groups, dict(pairwise(strengths)))
    return groups


def draw(figure: Any, study: Study, parts: dict[str, dict[Any, list[Trained]]]) -> None:
    """One panel a part: the test accuracy by the value, a faint line a seed and a strong one for the mean."""
    for panel, (part, groups) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        values = sorted({value for _, value in groups})
        for color, name in enumerate(NETS):
            columns = [[100 * accuracy for accuracy in accuracies(groups[name, value])] for value in values]
            draw_seeds(panel, range(len(values)), list(zip(*columns, strict=True)), name, f"C{color}")
        panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        panel.set(xlabel=part, ylabel="test accuracy (%)")
        panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study("batch_norm_savings", "What batch norm makes unnecessary", options(__doc__, arguments))
    rates = best_rates(study)
    study.head("The rule of the verdicts")
    study.say(
        """A change replaces the usual value by the one that should do with batch norm. Its cost is the test accuracy
        before it minus that after it; below 0, it gains. The usual value is the best of its part without norm, by the
        validation accuracy. A claim is reproduced if the change clearly costs accuracy without norm, and clearly less
        with batch norm."""
    )
    parts = {
        "factor of the learning rate after every second epoch": decay(study, rates),
        "dropout rate": dropout(study, rates),
        "L2 (weight decay of SGD)": weight_decay(study, rates),
    }
    study.head("What was scaled down")
    study.say(
        f"""Ioffe & Szegedy train Inception on ImageNet. Here a net of two convolutions (16 and 32 channels) and a
        hidden layer of 128 units trains on {IMAGES:,} images of Fashion-MNIST for {EPOCHS} epochs, with SGD, momentum
        0.9 and batches of 64. Batch norm stands after each convolution and after the hidden layer. The other
        claims on batch norm have [a page of their own](batch_norm.md)."""
    )
    study.write(
        lambda figure: draw(figure, study, parts),
        "Test accuracy by the factor of the decay, the dropout rate and the L2. Thin lines are single seeds, strong"
        " lines their means.",
        size=(13.0, 4.2),
    )


if __name__ == "__main__":
    main()
