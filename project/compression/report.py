"""The end of a compression run: each level's best net on validation and test images, its size and its speed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from project.frame.paths import Run
from project.frame.report_plots import plot_report
from project.learning.checkpoints import load_net
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A step of a compression run: its name and the checkpoint that it left."""

    name: str
    checkpoint: Path


def report_steps(trainer: Trainer, module: Classifier, steps: list[Step], *, measured: list[str]) -> list[ReportRow]:
    """Evaluate the checkpoints, measure the named ones together, and write ``report.csv`` and ``report.md``.

    Args:
        trainer: with a run's folder.
        module: a classifier whose structure any of the checkpoints fits after their surgeries; left as it was.
        steps: the first is the dense fp32 net, whose fastest engine the speedups compare with.
        measured: names of the steps whose latency is measured, in one interleaved run with the dense net's; empty
            measures nothing.
    """
    run, data = run_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
    assert run is not None and steps
    nets = {step.name: load_net(module, step.checkpoint) for step in steps}
    named = {
        f"{step}/{engine}": function
        for step in dict.fromkeys([steps[0].name, *measured] if measured else [])
        for engine, function in engines(nets[step], module.image_shape, _ENGINES).items()
    }
    times = measure(named, module.image_shape, rounds=30, budget_s=20) if named else {}
    by_step = {
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
    """Add the row of a model file to the run's report, in place of an older one of its kind.

    Args:
        trainer: with a run's folder that holds a report.
        module: as in :func:`report_steps`.
        step: its name, and the checkpoint that the file was made of.
        file: accuracy and speed are those of the runtime that it has.
        latency: measure the speed, in one interleaved run with the dense fp32 net's engines.
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
    """Add a step that left a checkpoint to the run's report, in place of an older one of its name.

    Args:
        trainer, module, latency: as in :func:`add_file_row`.
        step: its name and its checkpoint.
        names: engines that have what was done; those of the dense net by default.
    """
    run, data = run_of(trainer), trainer.datamodule  # type: ignore[attr-defined]
    assert run is not None
    net = load_net(module, step.checkpoint)
    own_engines = engines(net, module.image_shape, names or _ENGINES)
    named = {f"own {name}": function for name, function in own_engines.items()}
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
    """Times of the named functions, and of the dense fp32 net's engines in the same interleaved run."""
    dense = run.level_checkpoint(0) if run.level_checkpoint(0).is_file() else step.checkpoint
    everything = {**engines(load_net(module, dense), module.image_shape, _ENGINES), **named}
    own: _Times = {}
    reference: _Times = {}
    for (name, batch), time in measure(everything, module.image_shape, rounds=30, budget_s=20).items():
        (own if name in named else reference)[name, batch] = time
    return own, reference


def _publish(trainer: Trainer, rows: list[ReportRow], new: list[ReportRow]) -> None:
    """Write the report, show it in TensorBoard, and say what is new."""
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
def accuracy(logits_of: Callable[[Tensor], Tensor], data: ImageDataModule, split: str) -> float | None:
    """Share of right answers on the ``val`` or ``test`` images; ``None`` where there are none."""
    data.setup("test" if split == "test" else "validate")
    right, count = 0, 0
    for pixels, labels, _ in data.measured_images(split):
        images = data.normalize(pixels.float().div_(255))
        right += int((logits_of(images).argmax(1) == labels).sum())
        count += len(labels)
    return right / count if count else None


def _accuracy(net: nn.Module, data: ImageDataModule, split: str) -> float | None:
    net.to(memory_format=torch.channels_last)
    return accuracy(lambda images: net(images.contiguous(memory_format=torch.channels_last)), data, split)
