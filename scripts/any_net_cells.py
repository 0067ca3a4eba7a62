"""The cells of scripts/any_net.py: what a net goes through under each technique, and the law that must hold there."""

import csv
import json
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
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
from project.compression.thinning.units import masked_net, plan_thinning, units_of
from project.data import Digits
from project.deployment.export import TOLERANCE
from project.deployment.model_file import ModelFile
from project.deployment.recipe import Recipe
from project.frame.cli import CLI
from project.frame.errors import sentence
from project.frame.paths import Run
from project.learning.checkpoints import load_net, read_checkpoint
from project.learning.classifier import Classifier
from project.metrics.complexity import count_macs

MAX_MEMORY_MB, MAX_SECONDS = 4000, 600
"""What a cell may need."""


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


SETTINGS: dict[str, Any] = {
    "model": {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3, "weight_decay": 0.01}},
        "schedule": {"class_path": "project.learning.Cosine"},
    },
    "trainer": {"max_epochs": 4, "accelerator": "cpu", "observe": False, "enable_progress_bar": False},
}


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
        large: whether the net takes no images of 32x32 pixels.
    """

    def __init__(
        self, name: str, net: dict[str, Any], folder: Path, batches: int, epochs: int, large: bool = False
    ) -> None:
        self.name, self.folder = re.sub(r"\W+", "_", name), folder
        self.batches, self.epochs = batches, epochs
        kind = "LargeDigits" if large else "ColourDigits"
        data = {"class_path": f"any_net_cells.{kind}", "init_args": {"batch_size": 16 if large else 32}}
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
            name.replace(" ", "_"), {"trainer": {"callbacks": [*callbacks, {"class_path": "any_net_cells.Steps"}]}}
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
        run, dense = self.compress("units"), self.net(self.dense.best_checkpoint)
        shape = self.data.image_shape
        gone = {layer: of.outputs(range(0, of.num - 1, 3)) for layer, of in units_of(dense, shape).items()}
        masked, thinned = masked_net(dense, gone, shape), deepcopy(dense)
        plan_thinning(dense, gone, shape).apply_(thinned)
        error, digits = difference(self.logits(thinned), self.logits(masked)), ""
        if error > 1e-5:  # is it the rounding of a net that float32 itself computes no better?
            exact = [net.double()(self.images.double()) for net in (thinned, masked)]
            rounding = difference(self.logits(deepcopy(thinned).float()), exact[0])
            must(error <= 5 * rounding, f"thinned and masked net differ by {error:.1e} of the largest logit")
            error, digits = difference(*exact), " in double precision"
        must(error <= 1e-5, f"thinned and masked net differ by {error:.1e} of the largest logit")
        thinned = self.net(run.best_checkpoint)
        macs = [count_macs(net, shape) for net in (thinned, dense)]
        must(macs[0] < macs[1], "no unit was removed")
        return f"{self.accuracy(thinned):.1f} %, {100 * macs[0] / macs[1]:.0f} % MACs, {short(error)}{digits}"

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
        stopped = self.train("stopped", *few, callbacks=[{"class_path": "any_net_cells.Stop"}])
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
    """Run one cell, and judge what it ends with and what it needs."""
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # ends the process; it counts processor time
    cell = judge(work, name)
    signal.setitimer(signal.ITIMER_PROF, 0)
    if cell.peak_mb > MAX_MEMORY_MB:
        cell = Cell(name, "failed", f"the process needs {cell.peak_mb:.0f} MB", cell.seconds, cell.peak_mb)
    return cell


def judge(work: Any, name: str) -> Cell:
    """Run one cell, and judge what it ends with.

    Args:
        work: object whose method ``name`` returns the numbers, and whose ``model.net`` is the net.
        name: name of the method.
    """
    start, steps = time.process_time(), Steps.num
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
    cell.seconds = time.process_time() - start
    cell.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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
