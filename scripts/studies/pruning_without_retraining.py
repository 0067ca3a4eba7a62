"""Pruning without retraining: accuracy against the share that is removed, and the same after retraining.

Han et al. 2015 (arXiv:1506.02626, fig. 5). Weights and whole units, smallest magnitude first, the same share of each
layer, in a fully connected net and in the small Inception.

    python scripts/studies/pruning_without_retraining.py
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from evidence import Study, Trained, options
from pages import draw_seeds
from torch import nn
from verdicts import Claim, clearly, mean, spread, verdict

from project.compression import Pruner, plan_thinning, removed_units
from project.compression.pruning.masks import apply_masks_
from project.compression.report import accuracy
from project.compression.report_rows import read_report
from project.data import FashionMNIST
from project.frame.paths import Run
from project.models import LeNet300100, SmallInception

SHAPE = (1, 28, 28)
SHARES = [0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99]
NETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "LeNet300100": (LeNet300100, {}),
    "SmallInception": (SmallInception, {"width": 0.5}),
}
PRUNER: dict[str, Any] = {"scope": "layer", "round_to": 1}
STRUCTURES = ["weights", "units"]
HAN = "Han et al. 2015, sec. {}"
Curves = dict[tuple[str, str, str], list[list[float]]]


def config(net: str) -> dict[str, Any]:
    """A run that trains a dense net, and then prunes it further and retrains it at each share."""
    pruning = {
        "class_path": "project.callbacks.IterativeMagnitudePruning",
        "init_args": {
            "schedule": {"class_path": "project.compression.Sparsities", "init_args": {"levels": SHARES}},
            "pruner": {"class_path": "project.compression.Pruner", "init_args": {"structure": "weights", **PRUNER}},
            "after": "rewind_lr",
            "epochs_per_round": 2,
            "latency": False,
        },
    }
    return {
        "data": {"class_path": "project.data.FashionMNIST", "init_args": {"batch_size": 128}},
        "model": {
            "net": {"class_path": f"project.models.{net}", "init_args": NETS[net][1]},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-3}},
            "schedule": {"class_path": "project.learning.Linear"},
        },
        "trainer": {
            "max_epochs": 6,
            "limit_train_batches": 100,
            "limit_val_batches": 2,
            "observe": False,
            "callbacks": [pruning],
        },
    }


def dense_net(net: str, run: Trained) -> nn.Module:
    """The dense net of a run, before its first pruning."""
    assert run.folder is not None
    kind, arguments = NETS[net]
    dense = kind(10, SHAPE, **arguments)
    path = Run(run.folder).checkpoints / "level_0.ckpt"
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    dense.load_state_dict(
        {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    )
    return dense


def without_retraining(dense: nn.Module, structure: Any, measure: Callable[[nn.Module], float]) -> list[float]:
    """The accuracy of the dense net and, for each share, of a copy that is pruned in one step."""
    found = [measure(dense)]
    pruner = Pruner(structure, **PRUNER)
    groups = pruner.groups(dense, SHAPE)
    for share in SHARES:
        net = copy.deepcopy(dense)
        masks = pruner.prune(net, groups, {}, share)
        if structure == "units":
            plan_thinning(net, removed_units(groups, masks), SHAPE).apply_(net)
        else:
            apply_masks_(net, masks)
        found.append(measure(net))
    return found


def measure(study: Study) -> Curves:
    """The accuracies by net, structure and treatment; one row a seed, first the dense net, then each share."""
    curves: Curves = {}
    data = FashionMNIST()

    def accuracy_of(net: nn.Module) -> float:
        return accuracy(net.eval(), data, "test", limit_batches=1 if study.args.miniature else None) or 0.0

    for net in NETS:
        key = "trainer.callbacks.1.init_args.pruner.init_args.structure"
        for run in study.grid(net, config(net), {key: STRUCTURES}):
            structure = run.params[key]
            assert run.folder is not None
            before = without_retraining(dense_net(net, run), structure, accuracy_of)
            after = [row.test_accuracy or 0.0 for row in read_report(Run(run.folder).report)]
            for treatment, values in (("at once", before), ("retrained", after)):
                curves.setdefault((net, structure, treatment), []).append([100 * value for value in values])
                for share, value in zip([0.0, *SHARES], values, strict=True):
                    study.table.append(
                        {
                            "net": net,
                            "structure": structure,
                            "treatment": treatment,
                            "seed": run.seed,
                            "share": share,
                            "test_accuracy": value,
                        }
                    )
    return curves


def largest_share(row: Sequence[float], points: float = 1.0) -> float:
    """The largest share up to which the accuracy stays within some points of the dense net's."""
    kept = 0.0
    for share, value in zip(SHARES, row[1:], strict=True):
        if value < row[0] - points:
            break
        kept = share
    return kept


def decide(study: Study, curves: Curves) -> None:
    """Verdicts on what Han et al. say about figure 5."""
    free = {key: [largest_share(row) for row in rows] for key, rows in curves.items()}

    def shares(structure: str, treatment: str) -> str:
        return ", ".join(f"{net} {spread(free[net, structure, treatment], 0, 100)} %" for net in NETS)

    study.find(
        Claim("half of the weights go without retraining, at no loss", HAN.format("4, fig. 5")),
        verdict([1 if min(free[net, "weights", "at once"]) >= 0.5 else 0 for net in NETS]),
        f"largest share within one point of the dense net: {shares('weights', 'at once')}",
    )
    study.find(
        Claim("with retraining 90 % of the weights go", HAN.format("4, fig. 5")),
        verdict([1 if min(free[net, "weights", "retrained"]) >= 0.9 else 0 for net in NETS]),
        f"largest share within one point of the dense net: {shares('weights', 'retrained')}",
    )
    means = {key: [mean(row[1:]) for row in rows] for key, rows in curves.items()}
    study.find(
        Claim("whole units cost more accuracy than the same share of single weights", "Li et al. 2017, sec. 3"),
        verdict(
            [
                clearly(means[net, "weights", how], means[net, "units", how])
                for net in NETS
                for how in ("at once", "retrained")
            ]
        ),
        "; ".join(
            f"mean accuracy over all shares, {structure}, {how}: "
            + ", ".join(f"{net} {spread(means[net, structure, how], 1)} %" for net in NETS)
            for how in ("at once", "retrained")
            for structure in STRUCTURES
        ),
    )


def show(study: Study, curves: Curves) -> None:
    study.head("Test accuracy in percent")
    study.say(
        """At once: the dense net is pruned in one step and not trained. Retrained: the same run goes on with 2 epochs
        of 100 steps after each share. The share of units is that of each layer's units; the weights that read them go
        too, so that a larger share of the weights is gone. At least one unit of a layer stays. The first two claims
        hold for a net if its accuracy stays, with every seed, within one point of the dense net's up to half, and up to
        nine tenths, of the weights. The third compares the mean over all shares."""
    )
    for net in NETS:
        rows = [
            [f"{structure}, {how}", *(spread(column, 1) for column in zip(*curves[net, structure, how], strict=True))]
            for structure in STRUCTURES
            for how in ("at once", "retrained")
        ]
        study.show([net, "dense", *(f"{100 * share:g} %" for share in SHARES)], rows)


def draw(figure: Any, curves: Curves) -> None:
    """One panel a net: accuracy against the share that is removed."""
    for panel, net in zip(figure.subplots(1, 2, sharey=True), NETS, strict=True):
        for color, (structure, how) in enumerate((s, h) for s in STRUCTURES for h in ("at once", "retrained")):
            shares = [0.0, *(100 * share for share in SHARES)]
            draw_seeds(panel, shares, curves[net, structure, how], f"{structure}, {how}", f"C{color}")
        panel.axhline(mean([row[0] for row in curves[net, "weights", "at once"]]), color="gray", linewidth=0.6)
        panel.set(title=net, xlabel="share removed from each layer (%)", ylabel="test accuracy (%)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study(
        "pruning_without_retraining",
        "Pruning without retraining",
        options(__doc__, arguments),
        "compression/pruning, compression/thinning",
    )
    torch.set_num_threads(1)
    curves = measure(study)
    decide(study, curves)
    show(study, curves)
    study.head("What was scaled down")
    study.say(
        """Fashion-MNIST, 600 steps of 128 images for the dense net. Han et al. train AlexNet on ImageNet, retrain far
        longer, and choose a threshold for each layer. The retrained net has had more steps in all than the dense one;
        2 epochs of 100 steps come after each share, so the last shares profit from the earlier ones."""
    )
    study.write(
        lambda figure: draw(figure, curves),
        "Test accuracy against the share of weights or units that is removed from each layer. The gray line is the"
        " dense net. Thin lines are single seeds, strong lines their means.",
        size=(11.0, 4.2),
    )


if __name__ == "__main__":
    main()
