"""Pruning, shared and binary weights in nets with more weights than they need.

The study of efficient inference compresses a small Inception, which needs most of its weights. The papers compress nets
that have far more than they need. So are the two nets here: LeNet-300-100, as in Han et al. 2015 (arXiv:1506.02626),
and a stack of 8 convolutions with 128 channels for images of 8x8 pixels. Each setting trains as long as the dense net.

    python scripts/studies/large_nets.py
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficient_inference import (
    METHOD_ROOMS,
    MULTIPLIES,
    NO_LOSS,
    SMALLER,
    TINY_EPOCHS,
    Deployed,
    callback,
    no_loss,
    pruning,
    run_of,
)
from evidence import Study, by, options
from verdicts import Claim, clearly, mean, spread, verdict

from project.frame.plots import round_ticks

DENSE, NARROW, PRUNED, SHARED, BOTH, BINARY = (
    "dense",
    "narrow dense",
    "weights pruned",
    "weights shared",
    "weights pruned + shared",
    "binary",
)


@dataclass(frozen=True)
class Net:
    """A net and its data.

    Args:
        data: name of the data module in ``project.data``.
        batch_size: number of images of a batch, at least 1.
        net: class path of the net.
        dense, narrow: arguments of the net, and of a net with a tenth of its weights.
        epochs: number of epochs of each setting, at least 4.
        about: sentence about net and training, for the page.
    """

    data: str
    batch_size: int
    net: str
    dense: dict[str, Any]
    narrow: dict[str, Any]
    epochs: int
    about: str


NETS = {
    "LeNet-300-100": Net(
        "FashionMNIST",
        128,
        "plain_nets.Perceptron",
        {"hidden": [300, 100]},
        {"hidden": [30, 10]},
        8,
        "LeNet-300-100 has 266,200 weights and trains on all images of Fashion-MNIST for 8 epochs.",
    ),
    "wide stack": Net(
        "Digits",
        64,
        "plain_nets.PlainStack",
        {"depth": 8, "width": 128},
        {"depth": 8, "width": 40},
        20,
        "The wide stack has 1,034,624 weights and trains on scikit-learn's digits for 20 epochs.",
    ),
}


def config(net: Net, arguments: dict[str, Any]) -> dict[str, Any]:
    """Data and model, without a trainer. ``arguments`` are those of the net's class."""
    return {
        "data": {"class_path": f"project.data.{net.data}", "init_args": {"batch_size": net.batch_size}},
        "model": {
            "net": {"class_path": net.net, "init_args": arguments},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
            "schedule": {"class_path": "project.learning.Linear"},
        },
    }


def trainers(name: str, miniature: bool) -> dict[str, dict[str, Any]]:
    """The trainer of each setting that has the dense net, by its name."""
    epochs = TINY_EPOCHS if miniature else NETS[name].epochs
    shared, end = epochs // 4, epochs // 2 + 1
    sharer = {"class_path": "project.compression.Sharer", "init_args": {"bits": 4, "start": "optimal"}}
    sharing = callback("WeightSharing", sharer=sharer, epochs=shared, latency=False, report=False)
    given: dict[str, list[dict[str, Any]]] = {
        DENSE: [],
        PRUNED: [pruning("weights", end)],
        SHARED: [sharing],
        BOTH: [pruning("weights", end - shared), sharing],
        BINARY: [callback("TernaryWeights", method="bwn", report=False)],
    }
    return {
        setting: trainer(epochs - shared if sharing in callbacks else epochs, callbacks, miniature)
        for setting, callbacks in given.items()
    }


def trainer(epochs: int, callbacks: Sequence[Any], miniature: bool) -> dict[str, Any]:
    """The trainer of a run, which writes an ONNX and a packed file at its end."""
    few: dict[str, Any] = {"limit_train_batches": 2, "limit_val_batches": 1} if miniature else {}
    deploy = {"onnx": True, "limit_batches": 1 if miniature else None}
    callbacks = [*callbacks, {"class_path": "efficient_inference.Deploy", "init_args": deploy}]
    return {"max_epochs": epochs, "observe": False, "callbacks": callbacks, **few}


def train(study: Study, name: str) -> dict[str, Deployed]:
    """Train a net in all settings, and read what its files hold."""
    net, ways = NETS[name], trainers(name, study.args.miniature)
    arm = name.replace(" ", "_")
    runs = by(study.grid(arm, config(net, net.dense), {"trainer": ways}), "trainer")
    runs[NARROW,] = study.grid(f"{arm}_narrow", config(net, net.narrow), {"trainer": [ways[DENSE]]})
    found = {}
    for setting in (DENSE, NARROW, PRUNED, SHARED, BOTH, BINARY):
        rows = [json.loads((run_of(run).folder / "deployed.json").read_text()) for run in runs[setting,]]
        file = "ONNX" if setting in (DENSE, NARROW) else "packed"
        found[setting] = Deployed([row["accuracy"][file] for row in rows], [row["bytes"][file] for row in rows])
    return found


def decide(study: Study, found: Mapping[str, Mapping[str, Deployed]]) -> None:
    def loses(*settings: str) -> str:
        return _by_net(found, lambda net: [f"{each} {spread(net[each].loss(net[DENSE]))}" for each in settings])

    def smaller(*settings: str) -> str:
        return _by_net(found, lambda net: [f"{each} {net[each].smaller(net[DENSE]):.1f}" for each in settings])

    def product(net: Mapping[str, Deployed]) -> float:
        return net[PRUNED].smaller(net[DENSE]) * net[SHARED].smaller(net[DENSE])

    nets = list(found.values())
    study.find(
        Claim(
            f"90 % of the weights go without loss, and the file is at least {SMALLER:g} times smaller",
            "Han et al. 2015, abstract",
        ),
        verdict([sign for net in nets for sign in (no_loss(net[DENSE], net[PRUNED]), _smaller(net, PRUNED, SMALLER))]),
        f"loss of points: {loses(PRUNED)}; times smaller: {smaller(PRUNED)}",
    )
    study.find(
        Claim(
            "a large net that is pruned is better than a small dense net that trains as long",
            "Zhu & Gupta 2017, abstract",
        ),
        verdict([clearly(net[PRUNED].accuracies, net[NARROW].accuracies) for net in nets]),
        f"loss of points: {loses(PRUNED, NARROW)}; times smaller: {smaller(PRUNED, NARROW)}",
    )
    study.find(
        Claim(
            "16 shared values a layer (4 bits a weight) cost no accuracy", "after Han et al. 2016, who keep 32 and 256"
        ),
        verdict([no_loss(net[DENSE], net[SHARED]) for net in nets]),
        f"loss of points: {loses(SHARED)}; times smaller: {smaller(SHARED)}",
    )
    study.find(
        Claim(
            "pruning, sharing and coding (here not Huffman's code) make a smaller file than each alone, without loss",
            "Han et al. 2016, abstract",
        ),
        verdict(
            [
                sign
                for net in nets
                for sign in (
                    clearly(net[PRUNED].bytes, net[BOTH].bytes),
                    clearly(net[SHARED].bytes, net[BOTH].bytes),
                    no_loss(net[DENSE], net[BOTH]),
                )
            ]
        ),
        f"loss of points: {loses(BOTH)}; times smaller: {smaller(PRUNED, SHARED, BOTH)}",
    )
    study.find(
        Claim("in a chain of pruning and sharing the savings of bytes multiply", "after Han et al. 2016"),
        verdict([_smaller(net, BOTH, MULTIPLIES * product(net)) for net in nets]),
        "times smaller, and the product of the parts: "
        + _by_net(found, lambda net: [f"{net[BOTH].smaller(net[DENSE]):.1f} ({product(net):.1f})"]),
    )
    study.find(
        Claim("binary nets take 32 times fewer bytes", "Rastegari et al. 2016, abstract"),
        verdict([_smaller(net, BINARY, MULTIPLIES * 32) for net in nets]),
        f"times smaller: {smaller(BINARY)}; the first layer, the last layer and the norms stay in floating point",
    )


def _smaller(net: Mapping[str, Deployed], setting: str, limit: float) -> int:
    return int(net[setting].smaller(net[DENSE]) >= limit)


def _by_net(found: Mapping[str, Mapping[str, Deployed]], write: Any) -> str:
    return ", ".join(f"{name}: {', '.join(write(net))}" for name, net in found.items())


def draw(figure: Any, found: Mapping[str, Mapping[str, Deployed]]) -> None:
    """A panel a net: accuracy against the bytes of the file; a faint point a seed, a strong one for the mean."""
    for panel, (name, settings) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for color, (setting, each) in enumerate(settings.items()):
            values = [100 * value for value in each.accuracies]
            panel.plot([mean(each.bytes) / 1e3] * len(values), values, "o", color=f"C{color}", alpha=0.3, markersize=4)
            panel.plot(mean(each.bytes) / 1e3, mean(values), "o", color=f"C{color}", markersize=8, label=setting)
        panel.set(xscale="log", xlabel="kB of the file (logarithmic)", ylabel="test accuracy (%)", title=name)
        sizes = [mean(each.bytes) for each in settings.values()]
        round_ticks(panel, max(sizes) / min(sizes))
        panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study(
        "large_nets", "Efficient inference of nets with many weights", options(__doc__, arguments), METHOD_ROOMS
    )
    found = {name: train(study, name) for name in NETS}
    decide(study, found)
    study.head("All settings")
    study.say(
        """The accuracy is that of the deployed file on the test images: an ONNX file for the dense nets, the project's
        packed file for the others. "Times smaller" is the dense net's ONNX file over this file. Weights are pruned
        gradually, the smallest of the whole net first, from the second epoch to the middle of the training. The last
        quarter of the epochs has shared weights. The narrow net has a tenth of the weights. Every setting has the same
        number of epochs in all."""
    )
    for name, settings in found.items():
        study.say(NETS[name].about)
        rows = []
        for setting, each in settings.items():
            rows.append(
                [
                    setting,
                    spread(each.accuracies, 2, 100),
                    spread(each.loss(settings[DENSE])) if setting != DENSE else "",
                    f"{mean(each.bytes) / 1e3:.1f}",
                    f"{each.smaller(settings[DENSE]):.1f}",
                ]
            )
            for place, seed in enumerate(study.args.seeds):
                row = {"net": name, "setting": setting, "seed": seed, "bytes": each.bytes[place]}
                study.table.append({**row, "test_accuracy": each.accuracies[place]})
        study.show([name, "test accuracy, %", "loss, points", "kB", "times smaller"], rows)
    study.head("The rules of the verdicts")
    study.say(
        f"""They are those of [efficient inference](efficient_inference.md). A setting has no loss if its mean loss is
        below {NO_LOSS:g} points, or if the loss is within two standard errors over the seeds. Savings multiply if the
        chain reaches {100 * MULTIPLIES:g} % of the product; "32 times" means {100 * MULTIPLIES:g} % of 32 or more."""
    )
    study.head("What was scaled down")
    study.say(
        """Han et al. use MNIST and ImageNet, and retrain after pruning for as long as the first training took. They
        keep 32 shared values in fully connected layers and 256 in convolutions."""
    )
    study.write(
        lambda figure: draw(figure, found),
        "Test accuracy against the bytes of the file. Left and up is better. A faint point is a seed, a strong one the"
        " mean.",
        size=(11.0, 4.4),
    )


if __name__ == "__main__":
    main()
