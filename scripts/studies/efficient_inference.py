"""Six methods of efficient inference and their chains on one net, at equal training budgets.

Pruning of weights and of units, weight sharing, quantization to int8, low rank, ternary and binary nets, Winograd. Each
setting trains for the same number of steps as the dense net, the steps of the method included. What is deployed is
measured: a file is written, read again, and tested.

    python scripts/studies/efficient_inference.py
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from evidence import Study, Trained, by, options
from lightning.pytorch import Trainer
from pages import ROOT
from torch import nn
from verdicts import Answer, Claim, clearly, mean, spread, verdict

from project.compression.after_fit import AfterFit
from project.compression.company import check_company
from project.compression.low_bit.ternary_callback import TernaryWeights
from project.compression.low_rank.callback import LowRank
from project.compression.pruning.callback import IterativeMagnitudePruning
from project.compression.report import accuracy
from project.compression.weight_sharing.callback import WeightSharing
from project.compression.winograd.choice import WinogradChooser
from project.compression.winograd.convolution import WinogradConv2d
from project.data import FashionMNIST
from project.deployment import ModelFile
from project.deployment.engines import Engine, engine, onnx_engine
from project.deployment.export import Format, export_checkpoint
from project.deployment.int8.callback import PostTrainingQuantization
from project.deployment.latency import Latency, best, measure
from project.deployment.packed.file import open_packed
from project.deployment.table import write_latency
from project.frame.environment import cpu_abilities
from project.frame.paths import Run, write_whole
from project.learning.classifier import Classifier
from project.metrics import count_macs, count_nonzero
from project.models import SmallInception

METHOD_ROOMS = (
    "compression/pruning, compression/weight_sharing, compression/low_rank, compression/low_bit, compression/winograd,"
    " deployment/int8, deployment/packed"
)
"""Optional folders of the package that the methods need."""
SHAPE = (1, 28, 28)
WIDTH, NARROW = 0.5, 0.3
"""Widths of the net, and of the narrow net that trains as long."""
STEPS, EPOCHS, SHARED_EPOCHS, LOW_RANK_EPOCHS = 100, 8, 2, 3
"""Steps of an epoch; epochs of each setting; those of them with shared weights, and those with low-rank layers."""
TINY_EPOCHS = 4
"""Epochs of each setting in a miniature."""
NO_LOSS, LITTLE = 0.1, 1.0
"""Points of accuracy: what counts as no loss and as a little one."""
SMALLER, FASTER, ANY_FASTER, MULTIPLIES = 4.0, 1.5, 1.1, 0.8
"""Factors that count as smaller, as faster, as faster at all, and the share of a product that counts as the product."""
FILES: dict[str, Format] = {"ONNX": "onnx", "packed": "packed", "int8": "onnx-int8"}
DENSE, WINOGRAD = "dense", "Winograd"
TRUST = ("plain_nets",)
"""Modules whose nets a packed file may use."""


@dataclass(frozen=True)
class Setting:
    """A row of the table: which run it comes from, and which of the run's files is deployed."""

    run: str
    file: str
    parts: tuple[str, ...] = ()
    """The settings that a chain consists of."""


SETTINGS = {
    DENSE: Setting("dense", "ONNX"),
    "narrow dense": Setting("narrow dense", "ONNX"),
    "weights pruned": Setting("weights pruned", "packed"),
    "units pruned": Setting("units pruned", "ONNX"),
    "weights shared": Setting("weights shared", "packed"),
    "int8": Setting("dense", "int8"),
    "low rank": Setting("low rank", "ONNX"),
    "ternary": Setting("ternary", "packed"),
    "binary": Setting("binary", "packed"),
    "XNOR": Setting("XNOR", "packed"),
    WINOGRAD: Setting("dense", "ONNX"),
    "weights pruned + shared": Setting("weights pruned + shared", "packed", ("weights pruned", "weights shared")),
    "units pruned + shared": Setting("units pruned + shared", "packed", ("units pruned", "weights shared")),
    "units pruned + int8": Setting("units pruned", "int8", ("units pruned", "int8")),
    "low rank + int8": Setting("low rank", "int8", ("low rank", "int8")),
}


class Deploy(AfterFit):
    """Writes the files of a finished run, reads them again, and writes what they hold into ``deployed.json``.

    It stands after the callbacks that compress.

    Args:
        onnx: whether to write ONNX files in fp32 and int8 beside the packed file.
        limit_batches: number of batches of test images, 1 or more; ``None`` takes all.
    """

    def __init__(self, onnx: bool = False, limit_batches: int | None = None) -> None:
        self.files = list(FILES) if onnx else ["packed"]
        self.limit_batches = limit_batches

    def after_fit(self, trainer: Trainer, module: Classifier, run: Run, source: Path) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        found: dict[str, Any] = {"bytes": {}, "accuracy": {}}
        for name in self.files:
            path = run.model_file(FILES[name])
            # the accuracy is reported here, whatever the logits are
            limit = math.inf if name == "int8" else None
            export_checkpoint(module, data, source, path, format=FILES[name], tolerance=limit, compare_speed=False)
            found["bytes"][name] = path.stat().st_size
            found["accuracy"][name] = accuracy(ModelFile(path, TRUST).logits, data, "test", self.limit_batches)
        net = packed_net(run)
        found |= {"nonzero": count_nonzero(net), "macs": count_macs(net, data.image_shape)}
        write_whole(run.folder / "deployed.json", lambda part: part.write_text(json.dumps(found)))


# -- runs -------------------------------------------------------------------------------------------------------------


CONFIG = {
    "data": {"class_path": "project.data.FashionMNIST", "init_args": {"batch_size": 128}},
    "model": {
        "net": {"class_path": "project.models.SmallInception", "init_args": {"width": WIDTH}},
        "loss": {"class_path": "project.losses.CrossEntropy", "init_args": {"label_smoothing": 0.05}},
        "optimizer": {"class_path": "project.learning.Muon", "init_args": {"lr": 0.05, "weight_decay": 0.05}},
        "schedule": {"class_path": "project.learning.Linear", "init_args": {"warmup_epochs": 1}},
    },
}
"""Data and model of the fast recipe in small, without a trainer."""


def trainer(callbacks: Sequence[Any], epochs: int, miniature: bool, onnx: bool = False) -> dict[str, Any]:
    """The trainer of a run. ``callbacks`` are those that compress; the files are written after them."""
    deploy = {"onnx": onnx, "limit_batches": 1 if miniature else None}
    return {
        "max_epochs": epochs,
        "limit_train_batches": 2 if miniature else STEPS,
        "limit_val_batches": 1 if miniature else 20,
        "observe": False,
        "callbacks": [*callbacks, {"class_path": "efficient_inference.Deploy", "init_args": deploy}],
    }


def dense(miniature: bool) -> dict[str, Any]:
    """The trainer of a run without compression."""
    return trainer([], TINY_EPOCHS if miniature else EPOCHS, miniature, onnx=True)


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"project.callbacks.{name}", "init_args": arguments}


def pruning(structure: str, end_epoch: int) -> dict[str, Any]:
    """Gradual pruning after the first epoch: 90 % of the weights, or channels until the narrow net's cost is left."""
    if structure == "weights":
        final, every = 0.915, 25  # of the weights that are pruned: the last layer stays
        pruner: dict[str, Any] = {"structure": "weights", "criterion": "magnitude", "scope": "global"}
    else:
        dense, narrow = (count_macs(SmallInception(10, SHAPE, width=width), SHAPE) for width in (WIDTH, NARROW))
        final, every = round(1 - narrow / dense, 3), 100
        pruner = {"structure": "units", "criterion": "obd", "budget": "macs", "round_to": 8, "keep": 0.1}
    times = {"final": final, "begin_epoch": 1, "end_epoch": end_epoch, "every_n_steps": every}
    schedule = {"class_path": "project.compression.Gradual", "init_args": times}
    chosen = {"class_path": "project.compression.Pruner", "init_args": pruner}
    return callback("IterativeMagnitudePruning", schedule=schedule, pruner=chosen, latency=False, report=False)


def methods(miniature: bool) -> dict[str, dict[str, Any]]:
    """The trainer of each run that compresses while it trains, by its name."""
    epochs, shared, thin = (TINY_EPOCHS, 1, 1) if miniature else (EPOCHS, SHARED_EPOCHS, LOW_RANK_EPOCHS)
    end = epochs // 2 + 1
    sharer = {"class_path": "project.compression.Sharer", "init_args": {"bits": 4, "start": "optimal"}}
    sharing = callback("WeightSharing", sharer=sharer, epochs=shared, latency=False, report=False)
    ranks = {"ranks": "macs", "macs_left": 0.4, "round_to": 8, "num_images": 256}
    factorizer = {"class_path": "project.compression.Factorizer", "init_args": ranks}
    low_rank = callback(
        "LowRank", begin_epoch=epochs - thin, finetune_lr=0.3, factorizer=factorizer, latency=False, report=False
    )
    given: dict[str, list[Any]] = {
        "weights pruned": [pruning("weights", end)],
        "units pruned": [pruning("units", end)],
        "weights shared": [sharing],
        "low rank": [low_rank],
        "ternary": [callback("TernaryWeights", method="twn", report=False)],
        "binary": [callback("TernaryWeights", method="bwn", report=False)],
        "XNOR": [callback("XNORNet", report=False)],
        "weights pruned + shared": [pruning("weights", end - shared), sharing],
        "units pruned + shared": [pruning("units", end - shared), sharing],
    }
    return {
        name: trainer(
            callbacks, epochs - shared if sharing in callbacks else epochs, miniature, SETTINGS[name].file == "ONNX"
        )
        for name, callbacks in given.items()
        if name in SETTINGS
    }


def train(study: Study) -> dict[str, list[Trained]]:
    """The runs of each name, one a seed."""
    width = "model.net.init_args.width"
    miniature = study.args.miniature
    plain = by(study.grid("dense", CONFIG, {width: [WIDTH, NARROW], "trainer": [dense(miniature)]}), width)
    runs = {DENSE: plain[WIDTH,], "narrow dense": plain[NARROW,]}
    compressed = by(study.grid("methods", CONFIG, {"trainer": methods(miniature)}), "trainer")
    return runs | {str(name): group for (name,), group in compressed.items()}


# -- measurements -----------------------------------------------------------------------------------------------------


@dataclass
class Deployed:
    """What the files of a setting hold: one number a seed.

    Args:
        accuracies: test accuracy in the file's runtime, 0 to 1.
        bytes: size of the file in bytes, above 0.
    """

    accuracies: list[float]
    bytes: list[float]

    def loss(self, dense: "Deployed") -> list[float]:
        """Points of accuracy that the dense net of the same seed has more."""
        return [100 * (a - b) for a, b in zip(dense.accuracies, self.accuracies, strict=True)]

    def smaller(self, dense: "Deployed") -> float:
        """How many times fewer bytes the file has than that of the dense net."""
        return mean(dense.bytes) / mean(self.bytes)


@dataclass
class Measured(Deployed):
    """What was measured of one setting: one number a seed, and the latencies of the first seed's net."""

    macs: list[float]
    nonzero: list[float]
    latency: dict[int, Latency]
    engine: dict[int, str]
    eager: dict[int, Latency]
    """In PyTorch alone."""

    def faster(self, dense: "Measured", batch: int = 64) -> float:
        """How many times less time a batch takes than in the dense net, each in its fastest engine."""
        return dense.latency[batch].median_ms / self.latency[batch].median_ms


def packed_net(run: Run) -> nn.Module:
    """The net of a run, from its packed file."""
    return open_packed(run.model_file("packed"), TRUST)[0].eval()


def with_winograd(net: nn.Module, data: FashionMNIST) -> nn.Module:
    """A copy of a net whose 3x3 convolutions use Winograd's F(4x4, 3x3) where its rounding error allows it."""
    net = deepcopy(net).to(memory_format=torch.channels_last)
    images = data.sample(64)[0].contiguous(memory_format=torch.channels_last)
    WinogradChooser("f4").plan(net, images).surgery.apply_(net)
    return net


def run_of(trained: Trained) -> Run:
    assert trained.folder is not None, f"a run with {trained.params} could not be trained"
    return Run(trained.folder)


def measure_once(study: Study, runs: Mapping[str, Sequence[Trained]]) -> dict[str, Any]:
    """The latencies of all settings in one interleaved run, and the accuracies with Winograd. Kept beside the runs."""
    path = run_of(runs[DENSE][0]).folder / "measured_once.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["folders"] == {name: str(group[0].folder) for name, group in runs.items()}:
            return kept
    torch.set_num_threads(1)
    data = FashionMNIST(batch_size=128)
    data.prepare_data()
    data.setup("fit")
    found: dict[str, list[Any]] = {"accuracy": [], "difference": [], "layers": []}
    nets = []
    for trained in runs[DENSE]:
        net = packed_net(run_of(trained)).to(memory_format=torch.channels_last)
        nets.append(fast := with_winograd(net, data))
        images = data.sample(256)[0].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            direct, own = net(images), fast(images)
        found["accuracy"].append(accuracy(fast, data, "test", 1 if study.args.miniature else None))
        found["difference"].append(float((own - direct).abs().max() / direct.abs().max()))
        found["layers"].append(sum(type(layer) is WinogradConv2d for layer in fast.modules()))
    timed: dict[str, Engine] = {}
    for name, setting in SETTINGS.items():
        run = run_of(runs[setting.run][0])
        if setting.file == "int8":
            timed[f"{name}/onnxruntime"] = onnx_engine(run.model_file("onnx-int8"))
            continue
        timed[f"{name}/eager"] = engine("eager", nets[0] if name == WINOGRAD else packed_net(run), SHAPE)
        if name != WINOGRAD:  # an ONNX file holds ordinary convolutions
            timed[f"{name}/onnxruntime"] = engine("onnxruntime", packed_net(run), SHAPE)
    times = measure(timed, SHAPE, batch_sizes=(1, 64), rounds=3 if study.args.miniature else 100)
    kept = {
        "folders": {name: str(group[0].folder) for name, group in runs.items()},
        "winograd": found,
        "times": [{"name": name, "batch": batch, **asdict(time)} for (name, batch), time in times.items()],
    }
    write_whole(path, lambda part: part.write_text(json.dumps(kept)))
    return kept


def collect(runs: Mapping[str, Sequence[Trained]], once: Mapping[str, Any]) -> dict[str, Measured]:
    """All measurements by the name of the setting."""
    times: dict[str, dict[tuple[str, int], Latency]] = {}
    for row in once["times"]:
        name, _, engine_name = row["name"].partition("/")
        latency = Latency(**{key: value for key, value in row.items() if key not in ("name", "batch")})
        times.setdefault(name, {})[engine_name, row["batch"]] = latency
    found = {}
    for name, setting in SETTINGS.items():
        rows = [json.loads((run_of(run).folder / "deployed.json").read_text()) for run in runs[setting.run]]
        fastest = best(times[name])
        accuracies = [row["accuracy"][setting.file] for row in rows]
        found[name] = Measured(
            accuracies=once["winograd"]["accuracy"] if name == WINOGRAD else accuracies,
            bytes=[row["bytes"][setting.file] for row in rows],
            macs=[row["macs"] for row in rows],
            nonzero=[row["nonzero"] for row in rows],
            latency={batch: times[name][engine_name, batch] for batch, engine_name in fastest.items()},
            engine=fastest,
            eager={batch: time for (engine_name, batch), time in times[name].items() if engine_name == "eager"},
        )
    return found


# -- verdicts ---------------------------------------------------------------------------------------------------------


def no_loss(dense: Deployed, other: Deployed) -> int:
    """1 if the mean loss is below the limit, or if the seeds do not show it."""
    return 1 if mean(other.loss(dense)) < NO_LOSS or clearly(dense.accuracies, other.accuracies) != 1 else 0


def little(dense: Deployed, other: Deployed) -> int:
    return int(mean(other.loss(dense)) < LITTLE)


def decide(study: Study, found: Mapping[str, Measured], once: Mapping[str, Any]) -> None:
    dense = found[DENSE]

    def loses(*names: str) -> str:
        return "loss of points: " + ", ".join(f"{name} {spread(found[name].loss(dense))}" for name in names)

    def smaller(*names: str) -> str:
        return "times smaller: " + ", ".join(f"{name} {found[name].smaller(dense):.3g}" for name in names)

    def faster(*names: str) -> str:
        texts = [f"{name} {found[name].faster(dense, 64):.2f} ({found[name].faster(dense, 1):.2f})" for name in names]
        return f"times faster with 64 images (with one): {', '.join(texts)}"

    def is_smaller(name: str, limit: float = SMALLER) -> int:
        return int(found[name].smaller(dense) >= limit)

    def is_faster(name: str, limit: float = FASTER) -> int:
        return int(found[name].faster(dense) >= limit)

    def find(text: str, source: str, signs: Sequence[int], *because: str) -> None:
        answer: Answer = verdict(signs)
        study.find(Claim(text, source), answer, "; ".join(because))

    def better(first: str, second: str) -> int:
        return clearly(found[first].accuracies, found[second].accuracies)

    find(
        f"90 % of the weights go without loss, and the file is at least {SMALLER:g} times smaller",
        "Han et al. 2015, abstract",
        [no_loss(dense, found["weights pruned"]), is_smaller("weights pruned")],
        loses("weights pruned"),
        smaller("weights pruned"),
    )
    find(
        "pruned weights do not make a net faster without kernels for sparse weights, pruned units do",
        "Li et al. 2017, abstract",
        [int(found["weights pruned"].faster(dense) < ANY_FASTER), is_faster("units pruned")],
        faster("weights pruned", "units pruned"),
        loses("units pruned"),
    )
    find(
        "a large net that is pruned is better than a small dense net that trains as long",
        "Zhu & Gupta 2017, abstract",
        [better("weights pruned", "narrow dense"), better("units pruned", "narrow dense")],
        loses("weights pruned", "units pruned", "narrow dense"),
        f"""kB: {
            ", ".join(
                f"{name} {mean(found[name].bytes) / 1e3:.0f}"
                for name in ("weights pruned", "units pruned", "narrow dense")
            )
        }""",
    )
    find(
        "16 shared values a layer (4 bits a weight) cost no accuracy",
        "after Han et al. 2016, who keep 32 and 256",
        [no_loss(dense, found["weights shared"])],
        loses("weights shared"),
        smaller("weights shared"),
    )
    chain, parts = "weights pruned + shared", ("weights pruned", "weights shared")
    find(
        "pruning, sharing and coding (here not Huffman's code) make a smaller file than each alone, without loss",
        "Han et al. 2016, abstract",
        [*(clearly(found[part].bytes, found[chain].bytes) for part in parts), no_loss(dense, found[chain])],
        smaller(*parts, chain),
        loses(chain),
    )
    find(
        "int8 without training costs less than 2 points, saves three quarters of the bytes, and is 2 times faster",
        "Krishnamoorthi 2018, abstract",
        [int(mean(found["int8"].loss(dense)) < 2), is_smaller("int8", 3.5), is_faster("int8", 2.0)],
        loses("int8"),
        smaller("int8"),
        faster("int8"),
        f"the processor has {cpu_abilities()}",
    )
    find(
        "layers of low rank are faster at a loss below one point",
        "Jaderberg et al. 2014, abstract",
        [is_faster("low rank"), little(dense, found["low rank"])],
        faster("low rank"),
        loses("low rank"),
    )
    find(
        "ternary weights lose little, and less than binary ones",
        "Li & Liu 2016",
        [little(dense, found["ternary"]), better("ternary", "binary")],
        loses("ternary", "binary"),
        smaller("ternary", "binary"),
    )
    find(
        "binary inputs lose much beside binary weights alone",
        "Rastegari et al. 2016",
        [better("binary", "XNOR") * (1 - little(found["binary"], found["XNOR"]))],
        loses("binary", "XNOR"),
    )
    find(
        "binary nets take 32 times fewer bytes",
        "Rastegari et al. 2016, abstract",
        [is_smaller(name, MULTIPLIES * 32) for name in ("binary", "XNOR")],
        smaller("binary", "XNOR"),
        "the first layer, the last layer and the norms stay in floating point",
    )
    find(
        "binary nets are faster on a CPU",
        "Rastegari et al. 2016, abstract",
        [is_faster("binary"), is_faster("XNOR")],
        faster("binary", "XNOR"),
        "no engine here has kernels that count bits",
    )
    winograd, layers = found[WINOGRAD], once["winograd"]["layers"]
    gain = dense.eager[64].median_ms / winograd.eager[64].median_ms
    find(
        "Winograd's algorithm gives the same outputs in less time",
        "Lavin & Gray 2016, abstract",
        [int(max(map(abs, winograd.loss(dense))) <= NO_LOSS), int(gain >= ANY_FASTER and layers[0] > 0)],
        f"largest difference of a logit {max(once['winograd']['difference']):.1e} of the largest logit",
        loses(WINOGRAD),
        f"F(4x4, 3x3) in {layers[0]} layers; times faster in PyTorch with 64 images: {gain:.2f}, beside the dense net"
        f" in its fastest engine {winograd.faster(dense):.2f}",
    )
    chains = {name: setting.parts for name, setting in SETTINGS.items() if setting.parts}

    def product(name: str, batch: int | None) -> float:
        each = [found[p].smaller(dense) if batch is None else found[p].faster(dense, batch) for p in chains[name]]
        return math.prod(each)

    find(
        "in a chain the savings of bytes multiply",
        "after Han et al. 2016",
        [is_smaller(name, MULTIPLIES * product(name, None)) for name in chains],
        "times smaller, and the product of the parts: "
        + ", ".join(f"{name} {found[name].smaller(dense):.1f} ({product(name, None):.1f})" for name in chains),
    )
    quick = [name for name in chains if name.endswith("int8")]
    find(
        "in a chain with int8 the gains of speed multiply",
        "a common expectation",
        [is_faster(name, MULTIPLIES * product(name, 64)) for name in quick],
        "times faster with 64 images, and the product of the parts: "
        + ", ".join(f"{name} {found[name].faster(dense):.2f} ({product(name, 64):.2f})" for name in quick),
        f"the processor has {cpu_abilities()}",
    )


# -- the page ---------------------------------------------------------------------------------------------------------


def show(study: Study, found: Mapping[str, Measured]) -> None:
    dense = found[DENSE]
    study.head("All settings")
    study.say(
        f"""Fashion-MNIST, SmallInception of width {WIDTH:g}. Each setting trains for {EPOCHS} epochs of {STEPS} steps
        of 128 images, {EPOCHS * STEPS:,} steps in all, with the optimizer, schedule and loss of
        `configs/fashion_mnist.yaml`. Weights and units are pruned gradually within these epochs. The last
        {SHARED_EPOCHS} epochs have shared weights, the last {LOW_RANK_EPOCHS} epochs low-rank layers. Ternary, binary
        and XNOR nets train with rounded weights from the first step on. Int8 and Winograd change the dense net, or the
        net of the chain, after its last step: Winograd is F(4x4, 3x3) in each layer whose rounding error allows it. The
        narrow net has width {NARROW:g}; units are pruned until as many multiply-accumulates (MACs) are left as it has.
        """
    )
    study.say(
        """The file is what is deployed, and its accuracy is measured in its runtime: an ONNX file in fp32, an int8 ONNX
        file, or the project's packed file, whose range coder takes the place of Huffman's code.
        "Times smaller" is the dense net's ONNX file over this file. Latencies are medians (5th to 95th percentile) of
        one interleaved run with one thread on the nets of the first seed, in PyTorch or ONNX Runtime, whichever is
        faster. "Times faster" is over the dense net in its fastest engine. MACs count products with zeros and signs,
        too."""
    )
    rows = []
    for name, each in found.items():
        rows.append(
            [
                name,
                SETTINGS[name].file,
                spread(each.accuracies, 2, 100),
                spread(each.loss(dense)) if name != DENSE else "",
                f"{mean(each.macs) / 1e6:.2f}",
                f"{mean(each.nonzero) / 1e3:.1f}",
                f"{mean(each.bytes) / 1e3:.1f}",
                f"{each.smaller(dense):.1f}",
                *(write_latency(time.median_ms, time.p05_ms, time.p95_ms) for time in each.latency.values()),
                *(f"{each.faster(dense, batch):.2f}" for batch in each.latency),
                ", ".join(dict.fromkeys(each.engine.values())),
            ]
        )
    heads = ["setting", "file", "test accuracy, %", "loss, points", "million MACs", "thousand nonzero parameters", "kB"]
    heads += ["times smaller", "ms, 1 image", "ms, 64 images", "times faster, 1", "times faster, 64", "engine"]
    study.show(heads, rows)


def refusals() -> list[tuple[str, str]]:
    """Chains that one run refuses, and its sentence."""
    prune, share, int8 = IterativeMagnitudePruning, WeightSharing, PostTrainingQuantization
    tried = {
        "low rank, weights or units pruned": [prune(), LowRank(1)],
        "low rank, shared": [LowRank(1), share()],
        "ternary or binary, weights or units pruned": [prune(), TernaryWeights()],
        "ternary or binary, shared": [TernaryWeights(), share()],
        "ternary or binary, low rank": [LowRank(1), TernaryWeights()],
        "shared, int8": [share(), int8()],
    }
    found = []
    for name, callbacks in tried.items():
        for each in callbacks:
            try:
                if hasattr(each, "company"):
                    check_company(callbacks, each)
            except ValueError as error:
                found.append((name, str(error)))
                break
    return found


def rules(study: Study) -> None:
    study.head("Rules of the verdicts")
    study.say(
        f"""A setting has no loss if its mean loss is below {NO_LOSS:g} points, or if the loss is within two standard
        errors over the seeds. A little loss is below {LITTLE:g} point. Smaller means {SMALLER:g} times or more, and
        {0.875 * 4:g} times for three quarters of the bytes. Faster means {FASTER:g} times or more with 64 images. A net
        "does not become faster" if it is at most {ANY_FASTER:g} times as fast.
        Winograd is faster if it is above this limit in PyTorch, beside direct convolution. Savings multiply if the
        chain reaches {100 * MULTIPLIES:g} % of the product. Latencies are of one seed and one machine."""
    )
    study.head("Chains that are left out")
    study.say(
        """A run refuses these chains before its first step. Where its sentence names a second run, two runs make the
        chain; that would be a longer training than the others have. The same holds for weights and units in one net:
        a run takes one pruning callback."""
    )
    study.show(["chain", "what the run says"], refusals())
    study.head("What was scaled down")
    study.say(
        f"""One small net, one data set, {EPOCHS * STEPS:,} steps. [Recipes](../recipes.md) has the results of the same
        methods on a net of twice the width after 10 to 24 epochs of all images. The papers compress nets that are many
        times larger, and retrain them for as long as they were trained. Han et al. keep 32 shared values in fully
        connected layers and 256 in convolutions. Rastegari et al. count the operations of a kernel for bits.
        [Another study](large_nets.md) looks at the claims on bytes with nets that have more weights than they need."""
    )


def draw(figure: Any, found: Mapping[str, Measured]) -> None:
    """Accuracy against bytes and against the latency of 64 images; a faint point a seed, a strong one for the mean."""
    sys.path.append(str(ROOT / "scripts"))
    from point_labels import Label, label_points

    from project.frame.plots import round_ticks

    kinds = {"dense": "#5A5A5A", "one method": "#0067A0", "chain": "#C04F00"}
    panels = figure.subplots(1, 2, sharey=True)
    costs = {
        "kB of the file": lambda each: mean(each.bytes) / 1e3,
        "ms for 64 images in the fastest engine, one thread": lambda each: each.latency[64].median_ms,
    }
    for panel, (text, cost) in zip(panels, costs.items(), strict=True):
        labels, seeds = [], []
        for name, each in found.items():
            kind = "dense" if "dense" in name else "chain" if SETTINGS[name].parts else "one method"
            x, values = cost(each), [100 * value for value in each.accuracies]
            panel.plot([x] * len(values), values, "o", color=kinds[kind], alpha=0.3, markersize=3)
            look: dict[str, Any] = {"marker": "s", "markersize": 9, "markerfacecolor": "none"}
            panel.plot(x, mean(values), color=kinds[kind], **(look if kind == "dense" else {"marker": "o"}))
            labels.append(Label(name, x, mean(values), kinds[kind], 4.5 if kind == "dense" else 3))
            seeds += [(x, value) for value in values]
        panel.set_xscale("log")
        panel.margins(0.08)
        places = [label.x for label in labels]
        round_ticks(panel, max(places) / min(places))
        panel.set(xlabel=f"{text} (logarithmic)")
        panel.grid(alpha=0.3)
        panel.labels = labels, seeds
    panels[0].set_ylabel("test accuracy (%)")
    figure.canvas.draw()  # the layout must be final before the names find their places
    for panel in panels:
        label_points(panel, panel.labels[0], avoid=panel.labels[1], fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    study = Study(
        "efficient_inference", "Efficient inference: six methods on one net", options(__doc__, arguments), METHOD_ROOMS
    )
    runs = train(study)
    once = measure_once(study, runs)
    found = collect(runs, once)
    for name, each in found.items():
        for place, seed in enumerate(study.args.seeds):
            row = {"setting": name, "seed": seed, "file": SETTINGS[name].file}
            row |= {key: getattr(each, key)[place] for key in ("bytes", "macs", "nonzero")}
            row["test_accuracy"] = each.accuracies[place]
            row |= {f"ms_batch{batch}": time.median_ms for batch, time in each.latency.items()} if place == 0 else {}
            study.table.append(row)
    decide(study, found, once)
    show(study, found)
    rules(study)
    study.write(
        lambda figure: draw(figure, found),
        "Test accuracy against the bytes of the file, and against the latency. Left and up is better. A faint point is"
        " a seed, a strong one the mean; hollow squares are dense nets, orange points are chains.",
        size=(12.0, 5.6),
    )


if __name__ == "__main__":
    main()
