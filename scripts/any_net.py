"""Nets of torchvision and timm through every technique: what works, with its numbers, and what is refused, and why.

Each net is named in a configuration, as a user names it, and trained on scikit-learn's digits in colour. Each technique
then starts from this one fit. A cell works if its law holds: the thinned net computes what the masked one did, a packed
file holds the exact weights, a file gives the net's logits, a resumed run has the same bits as one without a stop. A
cell is refused if the program says in one sentence, before the first step, which layer or net it cannot do and what to
do instead. Anything else is a failure, and the command then ends with status 1.

    python scripts/any_net.py

Each net has a process of its own. It first trains and exports a small net, so that most libraries are loaded, and at
the end again, so that the last run is this one. The memory that the process holds is compared between the two. Both are
the resident memory after garbage collection, when the C library has given free pages back (``malloc_trim``). One thread
is used.
"""

import argparse
import csv
import ctypes
import gc
import json
import logging
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from project.compression.report import accuracy
from project.data import Digits
from project.deployment.export import TOLERANCE
from project.deployment.model_file import ModelFile
from project.deployment.recipe import Recipe
from project.deployment.table import markdown_line
from project.frame.cli import CLI
from project.frame.environment import describe_environment
from project.frame.errors import sentence
from project.frame.paths import Run
from project.learning.checkpoints import load_net, read_checkpoint
from project.learning.classifier import Classifier
from project.metrics.complexity import count_macs

ROOT = Path(__file__).resolve().parents[1]
MAX_MEMORY_MB, MAX_SECONDS, MAX_GROWTH_MB = 4000, 600, 200
"""What a cell may need, and what a process may hold more at its end than after its first net."""


class ColourDigits(Digits):
    """The digits as colour images of 32x32 pixels, with a tint, so that the channels differ."""

    image_shape = (3, 32, 32)
    mean = (0.3, 0.8, 0.3)  # type: ignore[assignment]
    std = (0.4, 0.2, 0.3)  # type: ignore[assignment]

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load(train)
        gray = F.interpolate(images.float(), self.image_shape[1:], mode="bilinear")
        tinted = torch.cat([gray, 255 - gray / 2, 0.7 * gray + 20], dim=1)
        return tinted.round().to(torch.uint8), labels


class LargeDigits(ColourDigits):
    """A part of the digits in the least size that Inception v3 takes."""

    image_shape = (3, 75, 75)

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = super().load(train)
        count = 400 if train else 100
        return images[:count], labels[:count]


def torchvision(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"torchvision.models.{name}", "init_args": arguments}


def timm(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": "timm.create_model", "init_args": {"model_name": name, **arguments}}


VIT = {"image_size": 32, "patch_size": 4, "num_layers": 3, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
STAGES = [(16, 32, 1), (32, 64, 1), (64, 96, 2), (96, None, 1)]
CONVNEXT = [dict(zip(("input_channels", "out_channels", "num_layers"), stage, strict=True)) for stage in STAGES]
BLOCK = "torchvision.models.convnext.CNBlockConfig"
NETS: dict[str, dict[str, Any]] = {
    "resnet18": torchvision("resnet18"),
    "googlenet": torchvision("googlenet", aux_logits=False, init_weights=False),
    "inception_v3": torchvision("inception_v3", aux_logits=False, init_weights=False),
    "densenet121": torchvision("DenseNet", growth_rate=8, block_config=[6, 12, 24, 16], num_init_features=16),
    "mobilenet_v2": torchvision("mobilenet_v2", width_mult=0.5),
    "mobilenet_v3_small": torchvision("mobilenet_v3_small", width_mult=0.5, norm_layer="torch.nn.BatchNorm2d"),
    "efficientnet_b0": torchvision("efficientnet_b0", stochastic_depth_prob=0.0),
    "shufflenet_v2_x0_5": torchvision("shufflenet_v2_x0_5"),
    "squeezenet1_1": torchvision("squeezenet1_1"),
    "regnet_y_400mf": torchvision("regnet_y_400mf"),
    "convnext (4 stages)": torchvision(
        "ConvNeXt", block_setting=[{"class_path": BLOCK, "init_args": stage} for stage in CONVNEXT]
    ),
    "vit (3 layers)": torchvision("VisionTransformer", **VIT),
    "tf_efficientnet_lite0": timm("tf_efficientnet_lite0"),
    "resnetv2_50x1_bit": timm("resnetv2_50x1_bit", channels=[128, 128, 256, 256]),
    "test_nfnet": timm("test_nfnet"),
    "ghostnet_050": timm("ghostnet_050"),
}
"""The nets, as ``model.net`` of a configuration has them; two with the arguments of the fragments in configs/nets."""
LARGE = ("inception_v3",)
WARM_UP = {"class_path": "project.models.SmallInception", "init_args": {"width": 0.25, "stem": [16], "stages": [[32]]}}

SETTINGS: dict[str, Any] = {
    "model": {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3, "weight_decay": 0.01}},
        "schedule": {"class_path": "project.learning.Cosine"},
    },
    "trainer": {"max_epochs": 4, "accelerator": "cpu", "observe": False, "enable_progress_bar": False},
}
EPOCHS = SETTINGS["trainer"]["max_epochs"]


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"project.callbacks.{name}", "init_args": arguments}


def part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"project.compression.{name}", "init_args": arguments}


ROUND: dict[str, Any] = {"epochs_per_round": 1, "latency": False}
FOUR_BITS = {"weight_bits": 4, "activations": False}
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "weights": [callback("IterativeMagnitudePruning", schedule=part("OneShot", sparsity=0.7), **ROUND)],
    "units": [
        callback(
            "IterativeMagnitudePruning",
            schedule=part("OneShot", sparsity=0.3),
            pruner=part("Pruner", structure="units", scope="layer"),
            **ROUND,
        )
    ],
    "sharing": [callback("WeightSharing", epochs=1, num_images=256, latency=False)],
    "low rank": [
        callback(
            "LowRank",
            begin_epoch=0,
            factorizer=part("Factorizer", macs_left=0.7, round_to=4, num_images=64),
            latency=False,
        )
    ],
    "ternary": [callback("TernaryWeights")],
    "four bits": [
        callback("QuantizationAwareTraining", weight_bits=4, activations=False),
        callback("PostTrainingQuantization", quantizer=FOUR_BITS, max_drop=1.0, latency=False),
    ],
    "winograd": [callback("WinogradConvolutions", algorithm="f4", batch_size=8, rounds=1, latency=False)],
}
"""The callbacks of each technique, as ``trainer.callbacks`` has them."""


class Wrong(Exception):  # noqa: N818
    """A law of a cell does not hold; the message says which."""


def must(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


class Steps(Callback):
    """Counts the steps of all runs of this process."""

    num = 0

    def on_train_batch_end(self, *_: Any) -> None:
        Steps.num += 1


class Stop(Callback):
    """Stops a run after its first epoch."""

    def __init__(self, stop: bool = True) -> None:
        self.stop = stop

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self.stop


@dataclass
class Cell:
    """A net under one technique.

    Args:
        name: name of the technique.
        status: ``works``, ``refused`` or ``failed``.
        text: the numbers, or the sentence of the refusal, or what went wrong.
        seconds: processor time that it took.
        peak_mb: largest memory of the process so far.
    """

    name: str
    status: str
    text: str
    seconds: float = 0.0
    peak_mb: float = 0.0


class Work:
    """All cells of one net, in this process. Each cell is a method that checks its law and returns its numbers.

    Args:
        name: name of the net, which names its runs.
        net: ``class_path`` and arguments of the net.
        folder: an existing folder for configurations.
        batches: number of training batches in an epoch of a technique; 1 or more.
        epochs: number of epochs of the fit; 1 or more.
    """

    def __init__(self, name: str, net: dict[str, Any], folder: Path, batches: int, epochs: int) -> None:
        self.name, self.folder = re.sub(r"\W+", "_", name), folder
        self.batches, self.epochs = batches, epochs
        kind = "LargeDigits" if name in LARGE else "ColourDigits"
        data = {"class_path": f"any_net.{kind}", "init_args": {"batch_size": 16 if name in LARGE else 32}}
        self.config = self._write("net", {**SETTINGS, "model": {**SETTINGS["model"], "net": net}, "data": data})
        package = net["class_path"].partition(".")[0]
        self.trust = ["--trust", package]

    def _write(self, name: str, values: dict[str, Any]) -> Path:
        path = self.folder / f"{self.name}_{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    # -- what cells share -----------------------------------------------------------------------------------------

    def run(self, verb: str, *arguments: str | Path) -> CLI:
        """The command line."""
        return CLI([verb, *map(str, arguments)])

    def train(self, name: str, *options: str | Path, callbacks: Sequence[dict[str, Any]] = ()) -> Run:
        own = self._write(
            name.replace(" ", "_"), {"trainer": {"callbacks": [*callbacks, {"class_path": "any_net.Steps"}]}}
        )
        experiment = f"--trainer.experiment={self.name}/{name.replace(' ', '_')}"
        cli = self.run("fit", "--config", self.config, "--config", own, experiment, *options)
        run: Run | None = vars(cli.trainer)["run"]
        assert run is not None
        return run

    def compress(self, technique: str, *options: str | Path) -> Run:
        """The run of a technique, from the weights of the fit on, with a few batches an epoch."""
        start = options or (
            "--weights",
            self.dense.best_checkpoint,
            "--trainer.max_epochs=1",
            "--model.optimizer.lr=5e-4",
        )
        few = f"--trainer.limit_train_batches={self.batches}"
        return self.train(technique, few, *start, callbacks=TECHNIQUES[technique])

    def begin(self) -> None:
        """The classifier without weights, the test images and a batch of them."""
        cli = CLI(["--config", str(self.config)], run=False)
        self.model: Classifier = cli.model
        self.data = cli.datamodule
        self.data.setup("test")
        assert self.data.test_data is not None
        pixels = self.data.test_data.__getitems__(list(range(64)))[0]
        self.images = self.data.normalize(pixels.float() / 255).contiguous()

    def net(self, checkpoint: Path) -> nn.Module:
        return load_net(self.model, checkpoint).eval()

    @torch.inference_mode()
    def logits(self, net: Callable[[Tensor], Tensor]) -> Tensor:
        return net(self.images)

    def accuracy(self, net: Callable[[Tensor], Tensor]) -> float:
        """In percent, of the test images."""
        reached = accuracy(net, self.data, "test")
        assert reached is not None
        return 100 * reached

    def checked_accuracy(self, run: Run) -> float:
        """The accuracy of the run's best checkpoint, which must be the one that the fit has told."""
        told = 100 * json.loads(run.summary.read_text(encoding="utf-8"))["test/accuracy"]
        found = self.accuracy(self.net(run.best_checkpoint))
        must(abs(told - found) < 0.6, f"the fit tells {told:.2f} %, but its checkpoint has {found:.2f} %")
        return found

    def file(self, run: Run, format: str) -> ModelFile:
        described = self.model.hparams["net"]
        return ModelFile(run.model_file(format), Recipe(described).modules)

    def packed(self, run: Run) -> ModelFile:
        """The packed file of a run, which must hold the weights of its best checkpoint and give the same logits."""
        self.run("export", "--run", run.folder, "--format", "packed", *self.trust)
        file, net = self.file(run, "packed"), self.net(run.best_checkpoint)
        assert file.net is not None
        found, wanted = file.net.state_dict(), net.state_dict()
        same = found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        must(same, "the packed file holds other weights than the checkpoint")
        net.to(memory_format=torch.channels_last)
        logits = self.logits(lambda images: net(images.contiguous(memory_format=torch.channels_last)))
        must(torch.equal(self.logits(file.logits), logits), "the packed file gives other logits than the checkpoint")
        return file

    def exported(self, format: str) -> str:
        self.run("export", "--run", self.dense.folder, "--format", format, *self.trust)
        error = difference(
            self.logits(self.file(self.dense, format).logits), self.logits(self.net(self.dense.best_checkpoint))
        )
        must(error <= TOLERANCE[format], f"its logits differ by {error:.1e} of the largest")  # type: ignore[index]
        return f"{short(error)}"

    # -- the cells ------------------------------------------------------------------------------------------------

    def fit(self) -> str:
        self.dense = self.train("fit", f"--trainer.max_epochs={self.epochs}")
        self.begin()
        return f"{self.checked_accuracy(self.dense):.1f} %"

    def onnx(self) -> str:
        return self.exported("onnx")

    def pt2(self) -> str:
        return self.exported("pt2")

    def int8(self) -> str:
        self.run("export", "--run", self.dense.folder, "--format", "onnx-int8", *self.trust)
        own, dense = self.file(self.dense, "onnx-int8").logits, self.net(self.dense.best_checkpoint)
        return f"{self.accuracy(own):.1f} of {self.accuracy(dense):.1f} %"

    def benchmark(self) -> str:
        options = ("--engines", "eager", "--rounds=1", "--memory=false")
        self.run("benchmark", "--run", self.dense.folder, *options, *self.trust)
        with self.dense.benchmark("csv").open(newline="", encoding="utf-8") as file:
            row = next(row for row in csv.DictReader(file) if row["engine"] == "eager")
        must(bool(row["latency_ms_batch1"]), f"no latency, but {row.get('remark')!r}")
        net = self.net(self.dense.best_checkpoint)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # torch does not count its fused attention
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            net(self.images[:1])
        torch.backends.mha.set_fastpath_enabled(fast_path)
        counted, macs = counter.get_total_flops() / 2, int(row["macs"])
        must(abs(macs - counted) <= 0.01 * counted, f"{macs} multiply-accumulates, but torch counts {counted:.0f}")
        reached = 100 * float(row["test_accuracy"])
        must(abs(reached - self.accuracy(net)) < 0.6, f"its accuracy is {reached:.2f} %, not that of the checkpoint")
        return f"{macs / 1e6:.1f} M MACs"

    def weights(self) -> str:
        run = self.compress("weights")
        state = read_checkpoint(run.best_checkpoint)
        masks = next(value["masks"] for value in state["callbacks"].values() if "masks" in value)
        zeros, size = 0, 0
        for name, mask in masks.items():
            weight = state["state_dict"][f"net.{name}"]
            must(not weight[~mask.expand_as(weight)].any(), f"{name} has values at pruned places")
            zeros, size = zeros + int((weight == 0).sum()), size + weight.numel()
        must(abs(zeros / size - 0.7) < 0.01, f"{100 * zeros / size:.1f} % are zero, not 70 %")
        return f"{self.checked_accuracy(run):.1f} %, {100 * zeros / size:.0f} % zeros"

    def units(self) -> str:
        run = self.compress("units")
        thinned, masked = self.net(run.best_checkpoint), self.net(run.level_checkpoint(1))
        error = difference(self.logits(thinned), self.logits(masked))
        must(error <= 1e-5, f"thinned and masked net differ by {error:.1e} of the largest logit")
        macs = [count_macs(net, self.data.image_shape) for net in (thinned, masked)]
        must(macs[0] < macs[1], "no unit was removed")
        return f"{self.accuracy(thinned):.1f} %, {100 * macs[0] / macs[1]:.0f} % MACs, {short(error)}"

    def sharing(self) -> str:
        on = ("--ckpt_path", self.dense.last_checkpoint, f"--trainer.max_epochs={self.epochs}")
        run = self.compress("sharing", *on)
        size = 4 * sum(parameter.numel() for parameter in self.net(self.dense.best_checkpoint).parameters())
        path = self.packed(run).path
        return f"{self.checked_accuracy(run):.1f} %, {size / path.stat().st_size:.1f}x, exact"

    def low_rank(self) -> str:
        run = self.compress("low rank")
        nets = [self.net(path) for path in (run.best_checkpoint, self.dense.best_checkpoint)]
        macs = [count_macs(net, self.data.image_shape) for net in nets]
        must(macs[0] <= 0.701 * macs[1], f"{100 * macs[0] / macs[1]:.1f} % of the multiply-accumulates are left")
        return f"{self.checked_accuracy(run):.1f} %, {100 * macs[0] / macs[1]:.0f} % MACs"

    def ternary(self) -> str:
        run = self.compress("ternary")
        net = self.packed(run).net
        assert net is not None
        few = [
            module.weight
            for module in net.modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and len(module.weight.unique()) <= 3
        ]
        must(bool(few), "no layer has ternary weights")
        size = sum(parameter.numel() for parameter in net.parameters())
        share = sum(weight.numel() for weight in few) / size
        return f"{self.checked_accuracy(run):.1f} %, {100 * share:.0f} % of weights, exact"

    def four_bits(self) -> str:
        run = self.compress("four bits")
        file = self.file(run, "onnx-int8")
        ratio = run.model_file("onnx").stat().st_size / file.path.stat().st_size
        return f"{self.accuracy(file.logits):.1f} of {self.checked_accuracy(run):.1f} %, {ratio:.1f}x"

    def winograd(self) -> str:
        run = self.compress("winograd")
        surgeries = read_checkpoint(run.best_checkpoint)["surgeries"]
        num = sum(len(surgery["tiles"]) for surgery in surgeries)
        if not num:
            return "0 layers"
        error = difference(self.logits(self.net(run.best_checkpoint)), self.logits(self.net(run.level_checkpoint(0))))
        must(error <= 1e-4, f"its logits differ by {error:.1e} of the largest from those of direct convolutions")
        return f"{num} layers, {short(error)}"

    def resume(self) -> str:
        few = ("--trainer.limit_train_batches=3", "--trainer.max_epochs=2", "--trainer.test_after_fit=false")
        whole = self.train("whole", *few)
        stopped = self.train("stopped", *few, callbacks=[{"class_path": "any_net.Stop"}])
        self.run("fit", "--resume", stopped.folder, "--trainer.callbacks.Stop.stop=false", *self.trust)
        one, other = read_checkpoint(whole.last_checkpoint), read_checkpoint(stopped.last_checkpoint)
        must(other["epoch"] == 1, "the resumed run has not reached the last epoch")
        for key in ("state_dict", "optimizer_states"):
            must(equal(one[key], other[key]), f"{key} differs from that of a run without a stop")
        return "same bits"


CELLS = {
    "fit": "fit",
    "onnx": "ONNX",
    "pt2": "pt2",
    "int8": "int8",
    "benchmark": "benchmark",
    "weights": "weights pruned",
    "units": "units pruned, thinned",
    "sharing": "shared, packed",
    "low_rank": "low rank",
    "ternary": "ternary, packed",
    "four_bits": "four bits",
    "winograd": "Winograd",
    "resume": "resume",
}
"""The methods of :class:`Work` in their order, each with the head of its column."""


WARMING = ("fit", "onnx", "pt2", "units", "four_bits")
"""The cells that a small net goes through first. They load all libraries."""


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of a logit, as a share of the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def short(error: float) -> str:
    """A difference with one digit, such as 3e-7."""
    return f"{error:.0e}".replace("e-0", "e-") if error else "0"


def equal(one: Any, other: Any) -> bool:
    """Whether nested values are the same, tensors to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# -- one cell ---------------------------------------------------------------------------------------------------------

REMEDY = re.compile(
    r"\b(add|choose|correct|exclude|give|include|install|keep|leave|lower|prune|raise|set|take|train|use|write)\b", re.I
)


def run_cell(work: Any, name: str) -> Cell:
    """Run one cell, and judge what it ends with."""
    start, steps = time.process_time(), Steps.num
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # ends the process; it counts processor time
    try:
        cell = Cell(name, "works", getattr(work, name)())
    except Wrong as error:
        cell = Cell(name, "failed", str(error))
    except (Exception, SystemExit) as error:
        text = sentence(error) if isinstance(error, Exception) else None
        if text is None or "shows the traceback" in text:  # the last is what the program says of a user's own file
            traceback.print_exc()
            cell = Cell(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            cell = Cell(name, "refused", text)
            if fault := fault_of(text, work, Steps.num - steps):
                cell = Cell(name, "failed", f"refused {fault}: {text}")
    signal.setitimer(signal.ITIMER_PROF, 0)
    cell.seconds = time.process_time() - start
    cell.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if cell.peak_mb > MAX_MEMORY_MB:
        cell = Cell(name, "failed", f"the process needs {cell.peak_mb:.0f} MB", cell.seconds, cell.peak_mb)
    return cell


def fault_of(text: str, work: Any, steps: int) -> str | None:
    """What a refusal lacks: it comes before the first step, and names a layer or the net, and a remedy."""
    if "this copy of the package does not have" in text:  # a fork without some of the rooms
        return None
    if steps:
        return f"after {steps} steps"
    net = work.model.net
    names = [type(net).__name__, *(name for name, _ in net.named_modules() if name)]
    if not any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", text) for name in names):
        return "without the name of a layer"
    return None if REMEDY.search(text) else "without a remedy"


def resident_mb() -> float:
    """The memory of this process after garbage collection, when the C library has given free pages back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run_small_net(cells: Sequence[str], folder: Path) -> None:
    """Train and export a small net, so that most libraries are loaded, and nothing else is kept than this net."""
    folder.mkdir()
    work = Work("small", WARM_UP, folder, batches=1, epochs=1)
    for cell in WARMING:
        if cell in cells:
            run_cell(work, cell)


def run_net(name: str, cells: Sequence[str], folder: Path, batches: int, epochs: int) -> None:
    """Run the cells of one net, and print a line of JSON for each, and one for the memory."""
    for logger in ("lightning.pytorch", "lightning.fabric", "project"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run_small_net(cells, folder / "first")
    before = resident_mb()
    work = Work(name, NETS[name], folder, batches, epochs)
    for cell in cells:
        say({"begin": cell})
        say(asdict(run_cell(work, cell)))
    parameters = sum(parameter.numel() for parameter in work.model.net.parameters())
    shape = work.data.image_shape
    del work
    run_small_net(cells, folder / "last")  # jsonargparse keeps the last run
    say({"parameters": parameters, "shape": shape, "before_mb": before, "after_mb": resident_mb()})


def say(line: Any) -> None:
    text = line if isinstance(line, str) else f"{MARK}{json.dumps(line)}"
    print(text, flush=True)  # noqa: T201


MARK = "any_net: "


# -- all nets ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What one net's process has told.

    Args:
        net: name of the net.
        cells: the cells, in the order of the columns.
        parameters: number of parameters.
        shape: shape (C, H, W) of an image.
        before_mb, after_mb: memory of the process after its first small net, and at its end.
    """

    net: str
    cells: list[Cell]
    parameters: int = 0
    shape: tuple[int, ...] = ()
    before_mb: float = 0.0
    after_mb: float = 0.0

    @property
    def failures(self) -> Iterator[str]:
        for cell in self.cells:
            if cell.status == "failed":
                yield f"{self.net}, {CELLS[cell.name]}: {cell.text}"
        if self.after_mb - self.before_mb > MAX_GROWTH_MB:
            yield f"{self.net}: the process keeps {self.after_mb - self.before_mb:.0f} MB"


def row_of(name: str, cells: Sequence[str], options: Sequence[str]) -> Row:
    """Run a net in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PROJECT_LOGS_DIR": f"{folder}/logs"}
        command = [sys.executable, __file__, "--nets", name, "--cells", *cells, "--within", folder, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    row = Row(name, [Cell(**line) for line in lines if "status" in line])
    if lines and "before_mb" in lines[-1]:
        vars(row).update(lines[-1])
    else:
        begun = next((line["begin"] for line in reversed(lines) if "begin" in line), cells[0])
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        how = "it took too long" if done.returncode == -signal.SIGPROF else f"exit status {done.returncode}, {last}"
        row.cells = [cell for cell in row.cells if cell.name != begun] + [Cell(begun, "failed", f"it ended: {how}")]
    if any(row.failures):
        say(done.stderr.strip())
    return row


def to_markdown(rows: Sequence[Row], cells: Sequence[str], command: str) -> str:
    """The page: a table of all cells, the refusals as footnotes, and a table of memory and time."""
    machine = describe_environment()
    packages = [
        f"{name} {machine['packages'][name]}" for name in ("torch", "onnxruntime") if name in machine["packages"]
    ]
    heads = ["net", *(CELLS[cell] for cell in cells)]
    lines = [markdown_line(heads), markdown_line(["---"] * len(heads))]
    notes: list[str] = []
    for row in rows:
        found = {cell.name: cell for cell in row.cells}
        words = [row.net]
        for name in cells:
            cell = found.get(name, Cell(name, "failed", "it was not run"))
            if cell.status == "works":
                words.append(cell.text)
                continue
            notes.append(f"{len(notes) + 1}. {row.net}, {CELLS[name]}: {' '.join(cell.text.split())}")
            words.append(f"{'**failed**' if cell.status == 'failed' else cell.status} ({len(notes)})")
        lines.append(markdown_line(words))
    costs = [markdown_line(["net", "parameters", "image", "seconds", "slowest cell, s", "peak, MB", "kept, MB"])]
    costs.append(markdown_line(["---", *["---:"] * 6]))
    for row in rows:
        seconds = [cell.seconds for cell in row.cells]
        peak = max((cell.peak_mb for cell in row.cells), default=0)
        values = [f"{row.parameters:,}", "x".join(map(str, row.shape)), f"{sum(seconds):.0f}", f"{max(seconds):.0f}"]
        kept = row.after_mb - row.before_mb
        mark = "**" if kept > MAX_GROWTH_MB else ""
        costs.append(markdown_line([row.net, *values, f"{peak:.0f}", f"{mark}{kept:+.0f}{mark}"]))
    counts = [sum(cell.status == status for row in rows for cell in row.cells) for status in ("works", "refused")]
    return PAGE.format(
        rooms=", ".join(ROOMS),
        command=command,
        day=date.today(),
        machine=f"{machine['cpu']}, one thread, {', '.join(packages)}",
        works=counts[0],
        refused=counts[1],
        all=len(rows) * len(cells),
        cells="\n".join(lines),
        notes="\n".join(notes) or "None.",
        costs="\n".join(costs),
    )


ROOMS = [
    *(f"compression/{name}" for name in ("pruning", "thinning", "weight_sharing", "low_rank", "low_bit", "qat")),
    *("compression/winograd", "deployment/int8", "deployment/packed", "deployment/benchmark"),
]
"""Folders of the package without which the page has no use."""
PAGE = """<!-- room: {rooms} -->
# Any net: what works

`{command}`, {day}, {machine}. The command ends with status 1 if a cell fails.

Of {all} cells {works} work and {refused} are refused with a reason. Each net is named in a configuration, as
[your net](your_net.md) shows, and trained for a few epochs on scikit-learn's digits in colour. Each technique starts
from this fit and trains for a few batches more. So the accuracies show that a technique works, not what it can reach.

{cells}

## How to read a cell

- An accuracy is that of the test images. Int8 and four bits have that of the file and that of the fp32 net.
- ONNX and pt2: largest difference between a logit of the file and of the net, as a share of the largest logit.
- benchmark: multiply-accumulates of an image, within 1 % of those that torch counts.
- weights pruned: 70 % of the weights are zero, at the places that the masks say.
- units pruned, thinned: 30 % of the units of each layer are removed where this is possible; the
  multiply-accumulates that are left, and the largest difference of a logit between thinned and masked net (at most
  1e-5 of the largest).
- shared, packed: fp32 bytes of the parameters over bytes of the packed file. The file holds the weights to the bit.
- low rank: the multiply-accumulates that are left, at most 70 %.
- ternary, packed: the share of all parameters that are ternary weights. The packed file holds them to the bit.
- four bits: bytes of the fp32 ONNX file over bytes of the file.
- Winograd: number of replaced convolutions, and the largest difference of a logit, as a share of the largest.
- resume: a run that is stopped after an epoch and resumed ends in the same bits as a run without a stop.

## Refused

{notes}

## Memory and time

Each net has a process of its own, which trains and exports a small net first, and again at the end. Peak is the largest
memory of the process. Kept is by how much its memory grew from the first small net to the last one, both after garbage
collection and `malloc_trim`. Libraries that the cells between them load count, too. More than 200 MB is in bold and
counts as a failure. Seconds are processor time.

{costs}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET")
    parser.add_argument(
        "--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help="fit is the first"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the fit")
    parser.add_argument("--batches", type=int, default=10, help="in an epoch of a technique")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/any_net.md", help="the page")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the results of single nets; those in it are not run again"
    )
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cells = ["fit", *(cell for cell in CELLS if cell in args.cells and cell != "fit")]
    if args.within:
        run_net(args.nets[0], cells, args.within, args.batches, args.epochs)
        return
    rows, start = [], time.perf_counter()
    for name in args.nets:
        kept = args.keep and args.keep / f"{name}.json"
        if kept and kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            rows.append(Row(**found | {"cells": [Cell(**cell) for cell in found["cells"]]}))
            continue
        rows.append(row_of(name, cells, [f"--epochs={args.epochs}", f"--batches={args.batches}"]))
        if kept:
            args.keep.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(asdict(rows[-1]), indent=1), encoding="utf-8")
        say(f"{time.perf_counter() - start:5.0f} s  {name}: {', '.join(cell.status for cell in rows[-1].cells)}")
    words = ["python", "scripts/any_net.py"]  # without the places of files
    for option in ("nets", "cells", "epochs", "batches"):
        value = getattr(args, option)
        if value != parser.get_default(option):
            words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    command = shlex.join(words)
    args.output.write_text(to_markdown(rows, cells, command), encoding="utf-8")
    failures = [failure for row in rows for failure in row.failures]
    say("\n".join(failures) or f"no failure: {args.output}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    from any_net import main  # configurations name the classes of this file by its name

    main()
