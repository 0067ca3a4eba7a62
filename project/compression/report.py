"""The report at the end of a compression run: accuracy, size and speed of the best net of each step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from project.callbacks.places import run_of, show_figure, tensorboard
from project.compression.report_rows import ReportRow, describe, read_report, to_markdown, write_report
from project.data import ImageDataModule
from project.deployment.engines import Engine, engines
from project.deployment.fastest_file import read_result
from project.deployment.latency import Latency, measure
from project.deployment.model_file import ModelFile
from project.deployment.report_plots import plot_report
from project.frame.paths import Run
from project.learning.checkpoints import load_net
from project.learning.classifier import Classifier
from project.models.net_check import channels_last_

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A step of a compression run.

    Args:
        name: name of the step in the report, such as ``dense``.
        checkpoint: checkpoint file that the step wrote.
    """

    name: str
    checkpoint: Path


def report_steps(trainer: Trainer, module: Classifier, steps: list[Step], *, measured: list[str]) -> list[ReportRow]:
    """Evaluate checkpoints, time some of them, and write ``report.csv`` and ``report.md``.

    Args:
        trainer: trainer of a run that has a folder and an ``ImageDataModule``.
        module: classifier of the run; it is not changed. Each checkpoint must fit it after the checkpoint's surgeries.
        steps: steps to report, at least one. The first is the dense fp32 net: speedups are relative to its fastest
            engine.
        measured: names of the steps to time, all in one interleaved run with the dense net. An empty list times
            nothing.
    """
    run, data = run_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
    assert run is not None and steps
    # All nets are timed in one interleaved run, so that they meet the same load of the machine.
    nets = {step.name: load_net(module, step.checkpoint) for step in steps}
    named = {
        f"{step}/{engine}": function
        for step in dict.fromkeys([steps[0].name, *measured] if measured else [])
        for engine, function in engines(nets[step], module.image_shape, _ENGINES).items()
    }
    times = measure(named, module.image_shape, rounds=30, budget_s=20) if named else {}
    by_step = {  # step -> (engine, batch size) -> time
        step: {
            (name.partition("/")[2], batch): time
            for (name, batch), time in times.items()
            if name.startswith(f"{step}/")
        }
        for step in nets
    }
    rows = [
        describe(
            step.name,
            nets[step.name],
            module.image_shape,
            file=step.checkpoint,
            val_accuracy=_accuracy(nets[step.name], data, "val"),
            test_accuracy=_accuracy(nets[step.name], data, "test"),
            latencies=by_step[step.name],
            reference=by_step[steps[0].name],
        )
        for step in steps
    ]
    _publish(trainer, rows, rows)
    return rows


def add_file_row(trainer: Trainer, module: Classifier, step: Step, file: ModelFile, *, latency: bool) -> None:
    """Add a row for a model file to the report of the run. It replaces an older row of a file with the same name.

    Args:
        trainer: trainer of a run whose folder holds a report.
        module: classifier of the run, as in :func:`report_steps`; it is not changed.
        step: name for the row, and the checkpoint that the file was made from.
        file: model file to evaluate; accuracy and speed are those of its own runtime.
        latency: whether to time the file, in one interleaved run with the engines of the dense fp32 net.
    """
    run, data = run_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
    assert run is not None
    net, engine = load_net(module, step.checkpoint), _ENGINE_OF[file.path.suffix]
    own, reference = _beside_dense(run, module, step, {engine: file.logits}) if latency else ({}, {})
    row = describe(
        step.name,
        net,
        module.image_shape,
        file=file.path,
        val_accuracy=accuracy(file.logits, data, "val"),
        test_accuracy=accuracy(file.logits, data, "test"),
        latencies=own,
        reference=reference,
    )
    older = [row for row in read_report(run.report) if row.file != file.path.name]
    _publish(trainer, [*older, row], [row])


def add_step_row(
    trainer: Trainer, module: Classifier, step: Step, *, latency: bool, names: Sequence[str] | None = None
) -> None:
    """Add a row for a checkpoint to the report of the run. It replaces an older row with the same name.

    Args:
        trainer: trainer of a run whose folder holds a report.
        module: classifier of the run, as in :func:`report_steps`; it is not changed.
        step: name for the row, and the checkpoint to evaluate.
        latency: whether to time the net, in one interleaved run with the engines of the dense fp32 net.
        names: engines to time, those that really use the change of this step. None means the engines of the dense net.
    """
    run, data = run_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
    assert run is not None
    net = load_net(module, step.checkpoint)
    own_engines = engines(net, module.image_shape, names or _ENGINES) if latency else {}
    named = {f"own {name}": function for name, function in own_engines.items()}  # the dense net's names differ
    own, reference = _beside_dense(run, module, step, named) if latency else ({}, {})
    row = describe(
        step.name,
        net,
        module.image_shape,
        file=step.checkpoint,
        val_accuracy=_accuracy(net, data, "val"),
        test_accuracy=_accuracy(net, data, "test"),
        latencies={(name.removeprefix("own "), batch): time for (name, batch), time in own.items()},
        reference=reference,
    )
    older = [row for row in read_report(run.report) if row.step != step.name]
    _publish(trainer, [*older, row], [row])


_Times = dict[tuple[str, int], Latency]


def _beside_dense(run: Run, module: Classifier, step: Step, named: Mapping[str, Engine]) -> tuple[_Times, _Times]:
    """The times of the named functions, and those of the dense fp32 net's engines from the same interleaved run."""
    # Level 0 is the dense net of a run that has one; otherwise the checkpoint itself counts as dense.
    dense = run.level_checkpoint(0) if run.level_checkpoint(0).is_file() else step.checkpoint
    everything = {**engines(load_net(module, dense), module.image_shape, _ENGINES), **named}
    own: _Times = {}
    reference: _Times = {}
    for (name, batch), time in measure(everything, module.image_shape, rounds=30, budget_s=20).items():
        (own if name in named else reference)[name, batch] = time
    return own, reference


def _publish(trainer: Trainer, rows: list[ReportRow], new: list[ReportRow]) -> None:
    """Write the report, show it in TensorBoard, and log the new rows."""
    run = run_of(trainer)
    assert run is not None
    result = read_result(run)
    write_report(rows, run.folder, result.sentence() if result else None)
    if any(row.test_accuracy is not None for row in rows):
        show_figure(trainer, "report", plot_report(rows))
    if (writer := tensorboard(trainer)) is not None:
        writer.add_text("report", to_markdown(rows), trainer.global_step)
    for row in new:
        log.info(
            "%-22s test %6.2f %%  %5.1f %% zeros  %9d MACs%s",
            row.step,
            100 * (row.test_accuracy or 0),
            100 * (row.sparsity or 0),
            row.macs,
            "" if row.speedup_batch64 is None else f"  {row.speedup_batch64:.2f}x at batch 64 ({row.engine})",
        )


_ENGINE_OF = {".onnx": "onnxruntime int8", ".packed": "eager, unpacked"}
_ENGINES = ["eager", "onnxruntime"]


@torch.inference_mode()
def accuracy(
    logits_of: Callable[[Tensor], Tensor], data: ImageDataModule, split: str, limit_batches: int | None = None
) -> float | None:
    """The accuracy, 0 to 1, on the ``val`` or ``test`` images; None if there are no such images.

    Args:
        logits_of: function of normalised images ``[N, C, H, W]`` that returns logits ``[N, K]``.
        data: data module with the images.
        split: set of images, ``val`` or ``test``.
        limit_batches: number of batches to measure on, the first ones, 1 or more; ``None`` takes all.
    """
    data.setup("test" if split == "test" else "validate")
    right, count = 0, 0
    for pixels, labels, _ in islice(data.measured_images(split), limit_batches):
        images = data.normalize(pixels.float().div_(255))
        right += int((logits_of(images).argmax(1) == labels).sum())
        count += len(labels)
    return right / count if count else None


def _accuracy(net: nn.Module, data: ImageDataModule, split: str) -> float | None:
    """The accuracy of a PyTorch net, computed in the memory format channels-last, which is fast on CPUs."""
    channels_last_(net)
    return accuracy(lambda images: net(images.contiguous(memory_format=torch.channels_last)), data, split)
