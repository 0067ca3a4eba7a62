"""Dropout, L1, L2 and max-norm: which one helps most, what each does to the weights, and one strength or two.

Srivastava et al. 2014 (JMLR 15); Ng 2004 (Feature selection, L1 vs. L2 regularization); Loshchilov & Hutter 2019
(arXiv:1711.05101).

    python scripts/studies/regularization.py
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from evidence import Study, Trained, accuracies, best_of, by, options
from verdicts import Claim, clearly, mean, spread, verdict

from project.frame.paths import Run

EPOCHS = 20
PENALTIES, NET = "model.penalties.init_args.", "model.net.init_args."
STRENGTHS = {
    "L1": [1e-4, 3e-4, 1e-3, 3e-3],
    "L2": [1e-3, 3e-3, 1e-2, 3e-2],
    "dropout": [0.05, 0.1, 0.2, 0.4],
    "max-norm": [0.25, 0.5, 1.0, 2.0],
}
"""Strengths that are tried, each the same for convolutions and linear layers."""
APART = {"L2": [0.0, 3e-3, 1e-2], "dropout": [0.0, 0.2, 0.45]}
"""Strengths that are combined freely, one for convolutions and one for linear layers."""


def config() -> dict[str, Any]:
    """A run on 3,000 images of Fashion-MNIST, which the net can learn by heart."""
    return {
        "data": {"class_path": "project.data.FashionMNIST", "init_args": {"batch_size": 64, "val_fraction": 0.95}},
        "model": {
            "net": {"class_path": "plain_nets.ConvThenLinear"},
            "penalties": {"class_path": "project.losses.Penalties"},
            "max_norm": {"class_path": "project.losses.MaxNorm"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03, "momentum": 0.9}},
            "schedule": {"class_path": "project.learning.Linear"},
        },
        "trainer": {
            "max_epochs": EPOCHS,
            "limit_val_batches": 5,
            "callbacks": [{"class_path": "project.callbacks.ActivationProbe", "init_args": {"num_images": 1000}}],
        },
    }


def choices(kind: str) -> tuple[str, dict[str, Any]]:
    """The key of the class that a regulariser is an argument of, and this class at each strength, by name."""
    conv, fc = (key.rpartition(".")[2] for key in keys_of(kind))
    key = keys_of(kind)[0].partition(".init_args")[0]
    node: Any = config()
    for part in key.split("."):
        node = node[part]
    return key, {f"{strength:g}": {**node, "init_args": {conv: strength, fc: strength}} for strength in STRENGTHS[kind]}


def keys_of(kind: str) -> tuple[str, str]:
    """The keys of the strength for convolutions and for linear layers."""
    return {
        "L1": (f"{PENALTIES}l1_conv", f"{PENALTIES}l1_fc"),
        "L2": (f"{PENALTIES}l2_conv", f"{PENALTIES}l2_fc"),
        "dropout": (f"{NET}conv_dropout", f"{NET}fc_dropout"),
        "max-norm": ("model.max_norm.init_args.conv", "model.max_norm.init_args.fc"),
    }[kind]


def weights_of(run: Trained) -> dict[str, torch.Tensor]:
    """The weights of the last net of a run, by layer."""
    assert run.folder is not None
    state = torch.load(Run(run.folder).checkpoints / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    return {name: value for name, value in state.items() if name.endswith("weight") and value.dim() > 1}


def share_of_zeros(run: Trained) -> float:
    """The share of weights below a thousandth of the largest weight of their layer."""
    layers = [weight.abs() for weight in weights_of(run).values()]
    small = sum(int((layer < 1e-3 * layer.max()).sum()) for layer in layers)
    return small / sum(layer.numel() for layer in layers)


def size(run: Trained) -> float:
    """The root mean square of all weights."""
    weights = torch.cat([weight.flatten() for weight in weights_of(run).values()])
    return float(weights.square().mean().sqrt())


def zeros_of_hidden(run: Trained) -> float:
    """The share of zeros among the activations of the hidden linear layer at the end of the run."""
    return run.last("probe/zeros/act")


def single(study: Study) -> dict[str, list[Trained]]:
    """Claim 1: each regulariser alone at its best strength. Returns the runs of each, and of none."""
    found = {"none": study.grid("none", config(), {})}
    rows, at_an_end = [], []
    for kind in STRENGTHS:
        key, named = choices(kind)
        groups = {str(name): runs for (name,), runs in by(study.grid(kind, config(), {key: named}), key).items()}
        best = best_of(groups)
        found[kind] = groups[best]
        at_an_end += [kind] if [*groups].index(best) in (0, len(groups) - 1) else []
        rows += [
            [kind, name, spread(accuracies(runs), 2, 100), "best" if name == best else ""]
            for name, runs in groups.items()
        ]
        study.record(kind, groups)
    study.record("none", {"none": found["none"]})
    rows.insert(0, ["none", "", spread(accuracies(found["none"]), 2, 100), ""])
    others = [kind for kind in STRENGTHS if kind != "dropout"]
    order = sorted(found, key=lambda kind: -mean(accuracies(found[kind])))
    study.find(
        Claim("dropout is the best single regulariser", "Srivastava et al. 2014, sec. 6.5, table 9"),
        verdict([min(clearly(accuracies(found["dropout"]), accuracies(found[kind])) for kind in others)]),
        f"""test accuracy in percent, best first: {
            ", ".join(f"{kind} {spread(accuracies(found[kind]), 2, 100)}" for kind in order)
        }""",
    )
    study.head("One regulariser at a time")
    study.say("Test accuracy. The best strength of each has the best accuracy on 5,000 validation images.")
    if at_an_end:
        study.say(f"A better one may lie outside the strengths that were tried: {', '.join(at_an_end)}.")
    study.show(["regulariser", "strength", "test accuracy, %", ""], rows)
    return found


def effects(study: Study, found: dict[str, list[Trained]]) -> None:
    """Claims 2 and 3: what each does to weights and activations."""
    measures: dict[str, Callable[[Trained], float]] = {
        "zeros": share_of_zeros,
        "size": size,
        "hidden": zeros_of_hidden,
    }
    values = {
        (kind, name): [take(run) for run in runs] for kind, runs in found.items() for name, take in measures.items()
    }
    study.find(
        Claim("dropout makes activations sparse and weights small", "Srivastava et al. 2014, sec. 7.2, fig. 8"),
        verdict(
            [
                clearly(values["dropout", "hidden"], values["none", "hidden"]),
                clearly(values["none", "size"], values["dropout", "size"]),
            ]
        ),
        f"""zeros among the hidden activations: {spread(values["dropout", "hidden"], 1, 100)} % with dropout,
        {spread(values["none", "hidden"], 1, 100)} without; root mean square of the weights
        {spread(values["dropout", "size"], 4)} with and {spread(values["none", "size"], 4)} without""",
    )
    study.find(
        Claim("L1 makes weights sparse, L2 makes them small", "Ng 2004, sec. 1 and 3"),
        verdict(
            [
                clearly(values["L1", "zeros"], values["L2", "zeros"]),
                clearly(values["none", "size"], values["L2", "size"]),
            ]
        ),
        f"""weights below a thousandth of their layer's largest: {spread(values["L1", "zeros"], 1, 100)} % with L1,
        {spread(values["L2", "zeros"], 1, 100)} with L2, {spread(values["none", "zeros"], 1, 100)} with none; root mean
        square {spread(values["L2", "size"], 4)} with L2, {spread(values["L1", "size"], 4)} with L1 and
        {spread(values["none", "size"], 4)} with none""",
    )
    study.head("Weights and activations")
    study.say("Each regulariser at its best strength, at the end of the run.")
    study.show(
        ["regulariser", "weights near 0, %", "root mean square of the weights", "zeros of the hidden layer, %"],
        [
            [
                kind,
                spread(values[kind, "zeros"], 1, 100),
                spread(values[kind, "size"], 4),
                spread(values[kind, "hidden"], 1, 100),
            ]
            for kind in found
        ],
    )
    for (kind, name), numbers in values.items():
        study.note(f"effect on {name}", kind, numbers)


def apart(study: Study) -> dict[str, dict[Any, list[Trained]]]:
    """Claim 4: one strength for all layers against one for convolutions and one for linear layers."""
    study.head("One strength or two")
    study.say(
        """All pairs of three strengths. One strength takes the best of the three pairs with equal values, two take the
        best of all nine; both are chosen on the validation images. The numbers are test accuracies."""
    )
    found, signs, texts = {}, [], []
    for kind, strengths in APART.items():
        conv, fc = keys_of(kind)
        groups = by(study.grid(f"apart_{kind}", config(), {conv: strengths, fc: strengths}), conv, fc)
        found[kind] = groups
        tied = best_of({key: runs for key, runs in groups.items() if key[0] == key[1]})
        free = best_of(groups)
        signs.append(clearly(accuracies(groups[free]), accuracies(groups[tied])))
        texts.append(
            f"{kind}: {spread(accuracies(groups[free]), 2, 100)} % with {free[0]:g} for convolutions and {free[1]:g}"
            f" for linear layers, {spread(accuracies(groups[tied]), 2, 100)} with {tied[0]:g} for both"
        )
        rows = [[f"{a:g}", *(spread(accuracies(groups[a, b]), 2, 100) for b in strengths)] for a in strengths]
        study.show([f"{kind}: convolutions, then linear layers", *(f"{b:g}" for b in strengths)], rows)
        study.record(f"apart, {kind}", {f"{a:g}, {b:g}": runs for (a, b), runs in groups.items()})
    study.find(
        Claim(
            "strengths for convolutions and linear layers are better tuned apart", "Srivastava et al. 2014, app. B.1"
        ),
        verdict(signs),
        "; ".join(texts),
    )
    return found


def draw(
    figure: Any, study: Study, groups: dict[str, dict[Any, list[Trained]]], found: dict[str, list[Trained]]
) -> None:
    """Test accuracy of each regulariser, a point a seed, and a map of both strengths for L2 and dropout."""
    axes = figure.subplots(1, 3)
    for place, runs in enumerate(found.values()):
        values = [100 * value for value in accuracies(runs)]
        axes[0].plot([place] * len(values), values, "o", color="C0", alpha=0.4)
        axes[0].plot([place - 0.25, place + 0.25], [statistics.fmean(values)] * 2, color="C0")
    axes[0].set_xticks(range(len(found)), list(found), rotation=20)
    axes[0].set(ylabel="test accuracy (%)", title="best strength of each")
    axes[0].grid(alpha=0.3)
    for panel, (kind, strengths) in zip(axes[1:], APART.items(), strict=True):
        table = [[100 * mean(accuracies(groups[kind][a, b])) for b in strengths] for a in strengths]
        low, high = min(map(min, table)), max(map(max, table))
        panel.imshow(table, origin="lower", cmap="viridis", vmin=low, vmax=high + 1e-9)
        for row, line in enumerate(table):
            for column, value in enumerate(line):
                color = "black" if value > (low + high) / 2 else "white"
                panel.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=9)
        names = [f"{strength:g}" for strength in strengths]
        panel.set_xticks(range(len(names)), names)
        panel.set_yticks(range(len(names)), names)
        panel.set(xlabel=f"{kind} of linear layers", ylabel=f"{kind} of convolutions", title="test accuracy (%)")


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study(
        "regularization", "What dropout, L1, L2 and max-norm do", options(__doc__, arguments), "metrics/probes"
    )
    found = single(study)
    effects(study, found)
    groups = apart(study)
    study.head("What was scaled down")
    study.say(
        f"""3,000 training images of Fashion-MNIST, two convolutions of 16 and 32 channels, a hidden layer of 128 units,
        {EPOCHS} epochs for every arm. Srivastava et al. train nets of thousands of units far longer, with larger
        rates and max-norm beside dropout. A net with dropout may need more epochs than the others."""
    )
    study.write(
        lambda figure: draw(figure, study, groups, found),
        "Left: test accuracy with the best strength of each regulariser, a point for each seed. Middle and right: mean"
        " test accuracy by the strengths for convolutions and linear layers.",
        size=(13.0, 4.2),
    )


if __name__ == "__main__":
    main()
