"""``project benchmark``: accuracy, size, memory and speed of runs on every engine, in one table and one picture.

Each engine classifies the test images itself. So the table shows what rounding or quantization does to the accuracy.
All engines of all runs are timed in the same rounds (:func:`project.deployment.latency.measure`). The ``*.onnx`` and
``*.packed`` files in a run's folder are measured too: they are its deployed models.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from project.data import ImageDataModule, Normalize
from project.deployment.benchmark.memory import peak_memory
from project.deployment.benchmark.rows import BenchmarkRow, with_speedups
from project.deployment.benchmark.subjects import Subject, check_data, first_line
from project.deployment.engines import FILE_ENGINES, Engine, available, check_engine, engine
from project.deployment.latency import Latency, measure
from project.deployment.model_file import ModelFile
from project.deployment.recipe import Recipe
from project.learning.classifier import Classifier
from project.metrics.complexity import count_macs, count_nonzero, count_parameters

log = logging.getLogger(__name__)

BATCH = 64
"""Batch size of the throughput and of the accuracy. A compiled net is compiled for this size and for 1."""
ON_FILES = {".onnx": ("onnxruntime", "openvino"), ".packed": ("eager",)}
"""Engines that run the model files in a run's folder, by the file's suffix."""


@dataclass
class Entry:
    """One engine that runs one net.

    Args:
        subject: net of a run.
        engine: name of the engine.
        file: path of the file that the engine loads.
        deployed: whether the file is a model file in the run's folder.
        forward: function that runs the net; ``None`` if the engine did not start.
        remark: reason why the engine did not start; ``None`` if it did.
    """

    subject: Subject
    engine: str
    file: Path
    deployed: bool
    forward: Engine | None = None
    remark: str | None = None

    @property
    def label(self) -> str:
        return f"{self.subject.name}, {self.file.name + ', ' if self.deployed else ''}{self.engine}"


def benchmark(
    subjects: Sequence[Subject],
    data: ImageDataModule,
    *,
    engines: Sequence[str] | None = None,
    num_images: int | None = None,
    rounds: int = 50,
    budget_s: float | None = 30.0,
    memory: bool = True,
) -> list[BenchmarkRow]:
    """Measure every subject on every engine.

    Args:
        subjects: nets to measure. Speedups compare with the best fp32 engine of the first one.
        data: data module that gives the test images for the accuracy.
        engines: names of engines (:mod:`project.deployment.engines`); ``None`` takes all that are installed.
        num_images: number of test images to use, from the first on; 1 or more. ``None`` takes all.
        rounds: number of timed calls of each engine at each batch size; 1 or more.
        budget_s: seconds after which no new round begins; 0 or more. ``None`` runs all rounds.
        memory: whether to measure peak memory too.

    Returns:
        One row for each engine of each subject, in the order of the engines, and the model files last.

    Raises:
        ValueError: if an engine is unknown or not installed, a model file cannot be run, a subject has other classes
            or images than the data, or no engine starts.
    """
    names = available() if engines is None else list(dict.fromkeys(engines))
    for name in names:
        check_engine(name)
    for name, value in (("rounds", rounds), ("num_images", num_images)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: choose 1 or more.")
    for subject in subjects:
        check_data(subject, data)
    with tempfile.TemporaryDirectory() as folder:
        entries = _entries(subjects, names, Path(folder))
        log.info("starting %s; threads: %d", ", ".join(names), torch.get_num_threads())
        for entry in sorted(entries, key=lambda entry: not entry.deployed):  # files first: they may raise an error
            _start_(entry)
        started = {str(index): entry.forward for index, entry in enumerate(entries) if entry.forward}
        if not started:
            raise ValueError(f"engines are {', '.join(names)}, but none of them runs this net: {entries[0].remark}.")
        log.info("accuracy on the test images")
        right, count = _count_right(entries, data, num_images)
        log.info("timing, at most %d rounds", rounds)
        shape = subjects[0].module.image_shape
        latencies = measure(started, shape, batch_sizes=(1, BATCH), rounds=rounds, budget_s=budget_s)
        rows = [
            _row(entry, right[index] / count, count, latencies.get((str(index), 1)), latencies.get((str(index), BATCH)))
            for index, entry in enumerate(entries)
        ]
        if memory:
            log.info("memory")
            rows = _with_memory(rows, entries, shape)
    return with_speedups(rows)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Set the number of threads of PyTorch, and of the engines built inside the ``with`` block.

    ``None`` changes nothing.

    Raises:
        ValueError: if the number is below 1.
    """
    if number is not None and number < 1:
        raise ValueError(f"threads is {number}: choose 1 or more, or null for PyTorch's own number.")
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- what is measured ------------------------------------------------------------------------------------------------


def _entries(subjects: Sequence[Subject], names: Sequence[str], folder: Path) -> list[Entry]:
    """All engines of all runs. The rows of one engine follow each other, and the model files come last."""
    made = [
        Entry(subject, name, folder / f"{index}.{_kind(name)}", deployed=False)
        for name in names
        for index, subject in enumerate(subjects)
    ]
    deployed = [
        Entry(subject, name, file, deployed=True)
        for subject in subjects
        for file in subject.files
        for name in names
        if name in ON_FILES[file.suffix]
    ]
    return made + deployed


def _kind(name: str) -> str:
    """Suffix of the file that an engine loads."""
    return "onnx" if name in FILE_ENGINES else "bf16.pt" if name == "bf16" else "pt"


def _start_(entry: Entry) -> None:
    """Build the engine and run both batch sizes, so that compilation is over before the timing.

    An engine that cannot run this net is left out, with a remark. A model file that cannot be run is an error.
    """
    module = entry.subject.module
    try:
        if not entry.file.is_file():
            _write_net(entry.engine, module, entry.file)
        on_file = FILE_ENGINES.get(entry.engine)
        net = _unpacked(entry) if entry.file.suffix == ".packed" else module.net
        forward = on_file(entry.file) if on_file else engine(entry.engine, net, module.image_shape)
        for batch in (1, BATCH):
            shape = tuple(forward(torch.zeros(batch, *module.image_shape)).shape)
            if shape != (batch, module.num_classes):
                raise RuntimeError(f"{batch} images gave an output of shape {list(shape)}")
    except Exception as error:  # torch, a compiler or a runtime may raise any class
        if entry.deployed:
            raise error if isinstance(error, ValueError) else _unfit(entry, error) from error
        entry.remark = f"not measured, {type(error).__name__}: {first_line(error)}"
        log.info("%s: %s", entry.label, entry.remark)
        return
    entry.forward = forward


def _unpacked(entry: Entry) -> nn.Module:
    described = entry.subject.module.hparams.get("net")
    net = ModelFile(entry.file, Recipe(described).modules if described else ()).net
    assert net is not None
    return net


def _write_net(name: str, module: Classifier, path: Path) -> None:
    if name in FILE_ENGINES:
        from project.deployment.export import export_onnx

        export_onnx(module.net, path, module.image_shape)
        return
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    tensors = module.net.state_dict().items()
    torch.save({key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors}, path)


def _unfit(entry: Entry, error: Exception) -> ValueError:
    wanted = ["N", *entry.subject.module.image_shape]
    return ValueError(
        f"model file is {str(entry.file)!r}, but {entry.engine} cannot run it on images {wanted}, N of 1 and {BATCH} "
        f"({first_line(error)}): export it again, with a dynamic batch, or move it out of the run's folder."
    )


# -- how it is measured ----------------------------------------------------------------------------------------------


def _count_right(entries: Sequence[Entry], data: ImageDataModule, num_images: int | None) -> tuple[list[int], int]:
    """The number of test images that each engine classifies correctly, and the number of images."""
    right, count = [0] * len(entries), 0
    normalize = {
        entry.subject.name: Normalize(entry.subject.module.mean, entry.subject.module.std) for entry in entries
    }
    for pixels, labels in _test_batches(data, num_images):
        # Fill the last batch with real pixels: some engines choose their scales from the whole batch.
        padding = pixels[-1:].expand(BATCH - len(pixels), -1, -1, -1)
        images = torch.cat([pixels, padding]).float().div_(255)
        normalized = {name: function(images) for name, function in normalize.items()}
        for index, entry in enumerate(entries):
            if entry.forward is not None:
                predictions = entry.forward(normalized[entry.subject.name])[: len(labels)].argmax(1)
                right[index] += int((predictions == labels).sum())
        count += len(labels)
    return right, count


def _test_batches(data: ImageDataModule, num_images: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The first test images, uint8 ``[n, C, H, W]`` with n of at most 64, and labels ``[n]``."""
    data.prepare_data()
    data.setup("test")
    left = sys.maxsize if num_images is None else num_images
    for pixels, labels, _ in data.test_dataloader():
        pixels, labels = pixels[:left], labels[:left]
        left -= len(labels)
        yield from zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
        if not left:
            return


def _row(
    entry: Entry, accuracy: float, num_images: int, batch1: Latency | None, batch64: Latency | None
) -> BenchmarkRow:
    net: nn.Module = entry.subject.module.net
    row = BenchmarkRow(
        run=entry.subject.name,
        engine=entry.engine,
        file=entry.file.name if entry.deployed else None,
        num_parameters=count_parameters(net),
        num_nonzero=count_nonzero(net),
        macs=count_macs(net, entry.subject.module.image_shape),
        file_bytes=entry.file.stat().st_size if entry.file.is_file() else None,
        remark=entry.remark,
    )
    if batch1 is None or batch64 is None:
        return row
    return replace(row, test_accuracy=accuracy, num_images=num_images).with_latencies(batch1, batch64)


def _with_memory(
    rows: Sequence[BenchmarkRow], entries: Sequence[Entry], image_shape: tuple[int, int, int]
) -> list[BenchmarkRow]:
    started = [index for index, entry in enumerate(entries) if entry.forward is not None]
    tasks = [
        (entries[i].engine, entries[i].file if entries[i].engine in FILE_ENGINES else entries[i].subject.module.net)
        for i in started
    ]
    with_memory = list(rows)
    for index, found in zip(started, peak_memory(tasks, image_shape, BATCH), strict=True):
        if isinstance(found, int):
            with_memory[index] = replace(rows[index], peak_memory_bytes=found)
        else:
            with_memory[index] = replace(rows[index], remark=f"memory not measured, {found}")
            log.info("%s: memory not measured, %s", entries[index].label, found)
    return with_memory
