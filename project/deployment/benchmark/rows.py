"""The rows of ``project benchmark``: one for each engine and model file of each run, as CSV, Markdown and short table.

A speedup compares with the fastest fp32 engine on the CPU of the first run, at the same batch size and in the same
rounds. This engine itself has a speedup of 1.00x.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from project.deployment.engines import FP32
from project.deployment.latency import Latency
from project.deployment.table import markdown_line, write_latency, write_number


@dataclass(frozen=True)
class BenchmarkRow:
    """Accuracy, size, speed and memory of one engine on one run's net. A value that is unknown is ``None``.

    Example::

        >>> from project.deployment import BenchmarkRow, Latency
        >>> row = BenchmarkRow("digits/version_0", "onnxruntime", test_accuracy=0.991)
        >>> row = row.with_latencies(Latency(0.2, 0.19, 0.25, 50, 1), Latency(8.0, 7.9, 8.4, 50, 1))
        >>> row.images_per_second
        8000.0

    Args:
        run: name of the run, ``<experiment>/<version>``.
        engine: name of the engine (:mod:`project.deployment.engines`).
        file: name of the model file in the run's folder that the engine runs; ``None`` for the checkpoint's net.
        test_accuracy: fraction of the images that this engine classifies correctly, from 0 to 1.
        num_images: number of images that the accuracy was measured on; 1 or more.
        num_parameters: number of parameters of the checkpoint's net, as :mod:`project.metrics.complexity` counts.
        num_nonzero: number of these parameters that are not 0.
        macs: number of multiply-accumulates of the checkpoint's net for one image.
        file_bytes: bytes of the file that the engine loads. That is the model file or, for the checkpoint's net, its
            weights as ``torch.save`` writes them or the ONNX file that it is exported to.
        latency_ms_batch1: median time for one image, in milliseconds; above 0.
        latency_ms_batch1_p05: 5th percentile of the time for one image, in milliseconds.
        latency_ms_batch1_p95: 95th percentile of the time for one image, in milliseconds.
        latency_ms_batch64: median time for a batch of 64 images, in milliseconds; above 0.
        latency_ms_batch64_p05: 5th percentile of the time for a batch of 64 images, in milliseconds.
        latency_ms_batch64_p95: 95th percentile of the time for a batch of 64 images, in milliseconds.
        images_per_second: number of images per second at batch size 64, from the median.
        speedup_batch1: latency of the first run's best fp32 engine divided by this latency, at batch size 1.
        speedup_batch64: latency of the first run's best fp32 engine divided by this latency, at batch size 64.
        peak_memory_bytes: peak memory for a batch of 64 images (:mod:`project.deployment.benchmark.memory`), in bytes.
        num_rounds: number of timed calls for each batch size; 1 or more.
        num_threads: number of threads that the engine may use; 1 or more.
        remark: reason why values are missing; ``None`` if there is nothing to say.
    """

    run: str
    engine: str
    file: str | None = None
    test_accuracy: float | None = None
    num_images: int | None = None
    num_parameters: int | None = None
    num_nonzero: int | None = None
    macs: int | None = None
    file_bytes: int | None = None
    latency_ms_batch1: float | None = None
    latency_ms_batch1_p05: float | None = None
    latency_ms_batch1_p95: float | None = None
    latency_ms_batch64: float | None = None
    latency_ms_batch64_p05: float | None = None
    latency_ms_batch64_p95: float | None = None
    images_per_second: float | None = None
    speedup_batch1: float | None = None
    speedup_batch64: float | None = None
    peak_memory_bytes: int | None = None
    num_rounds: int | None = None
    num_threads: int | None = None
    remark: str | None = None

    @property
    def label(self) -> str:
        """The name of the engine, with the file in front if there is one."""
        return f"{self.file}, {self.engine}" if self.file else self.engine

    def with_latencies(self, batch1: Latency, batch64: Latency) -> "BenchmarkRow":
        """A copy of the row with latencies, throughput, and the numbers of rounds and threads.

        Args:
            batch1: latency of one image.
            batch64: latency of a batch of 64 images.
        """
        return replace(
            self,
            latency_ms_batch1=batch1.median_ms,
            latency_ms_batch1_p05=batch1.p05_ms,
            latency_ms_batch1_p95=batch1.p95_ms,
            latency_ms_batch64=batch64.median_ms,
            latency_ms_batch64_p05=batch64.p05_ms,
            latency_ms_batch64_p95=batch64.p95_ms,
            images_per_second=64000 / batch64.median_ms,
            num_rounds=batch64.num_rounds,
            num_threads=batch64.num_threads,
        )


def with_speedups(rows: Sequence[BenchmarkRow]) -> list[BenchmarkRow]:
    """The rows with speedups over the best fp32 engine of the first row's run.

    Without such an engine they stay unknown.
    """
    dense = [row for row in rows if row.run == rows[0].run and row.engine in FP32 and not row.file]
    best1 = min((row.latency_ms_batch1 for row in dense if row.latency_ms_batch1), default=None)
    best64 = min((row.latency_ms_batch64 for row in dense if row.latency_ms_batch64), default=None)
    return [
        replace(
            row,
            speedup_batch1=best1 / row.latency_ms_batch1 if best1 and row.latency_ms_batch1 else None,
            speedup_batch64=best64 / row.latency_ms_batch64 if best64 and row.latency_ms_batch64 else None,
        )
        for row in rows
    ]


def slow_files(rows: Sequence[BenchmarkRow]) -> list[str]:
    """A sentence for each model file that is smaller than the fp32 net but no faster in the same engine."""
    nets = {(row.run, row.engine): row for row in rows if not row.file}
    sentences = []
    for row in rows:
        net = nets.get((row.run, row.engine))
        if not (row.file and net and row.file_bytes and net.file_bytes and row.file_bytes < 0.9 * net.file_bytes):
            continue
        if row.latency_ms_batch64 and net.latency_ms_batch64 and net.latency_ms_batch64 < 1.05 * row.latency_ms_batch64:
            sentences.append(
                f"{row.run}, {row.label}: no faster than fp32 in the same engine on this processor "
                f"({net.latency_ms_batch64 / row.latency_ms_batch64:.2f} times its speed at batch 64); it only saves "
                "bytes."
            )
    return sentences


def to_markdown(rows: Sequence[BenchmarkRow], title: str, facts: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """A Markdown page: the facts, the table, and the remarks.

    Args:
        rows: rows of the table.
        title: title of the page.
        facts: facts such as machine and date, by name; they stand above the table.
        notes: sentences that stand below the table.
    """
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [markdown_line(_HEADS), markdown_line("---" if head in _WORDS else "---:" for head in _HEADS)]
    lines += [markdown_line(_cells(row)) for row in rows]
    remarks = [f"{row.run}, {row.label}: {row.remark}." for row in rows if row.remark]
    return "\n".join([*lines, *(f"\n{note}" for note in (*remarks, *notes, _LEGEND))]) + "\n"


def to_short_table(rows: Sequence[BenchmarkRow]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of a table that fits a terminal. It shows what differs between engines."""
    heads = ["engine", "accuracy", "bytes", "ms, batch 1 (p95)", "ms, batch 64 (p95)", "images/s"]
    heads += ["speedup 1", "speedup 64", "MB"]
    cells = [
        [
            row.label,
            write_number(_percent(row.test_accuracy), ".2f", " %"),
            write_number(row.file_bytes, ","),
            _with_p95(row.latency_ms_batch1, row.latency_ms_batch1_p95),
            _with_p95(row.latency_ms_batch64, row.latency_ms_batch64_p95),
            write_number(row.images_per_second, ",.0f"),
            write_number(row.speedup_batch1, ".2f"),
            write_number(row.speedup_batch64, ".2f"),
            write_number(_mega(row.peak_memory_bytes), ".1f"),
        ]
        for row in rows
    ]
    if len({row.run for row in rows}) > 1:
        heads = ["run", *heads]
        cells = [[row.run, *line] for row, line in zip(rows, cells, strict=True)]
    return heads, cells


_WORDS = ("run", "engine")
_HEADS = (
    *("run", "engine", "test accuracy", "parameters", "nonzero", "MACs", "bytes", "ms, batch 1", "ms, batch 64"),
    *("images/s, batch 64", "speedup, batch 1", "speedup, batch 64", "peak memory, MB"),
)
_LEGEND = (
    "Each engine classifies the test images itself, for the accuracy. Milliseconds are medians for one batch, with the "
    "5th and the 95th percentile. Speedups compare with the first run's best fp32 engine on the CPU, at the same batch "
    "size. Bytes are those of the file that the engine loads: the model file that is named, else the weights as "
    "torch.save writes them, or the ONNX file that the net is exported to. Memory is the growth of a fresh process's "
    "peak memory while it loads the engine and runs one batch of 64 images, without the packages. Parameters, nonzeros "
    "and multiply-accumulates (MACs, for one image) are those of the checkpoint's net."
)


def _cells(row: BenchmarkRow) -> list[str]:
    return [
        row.run,
        row.label,
        write_number(row.test_accuracy, ".4f"),
        write_number(row.num_parameters, ","),
        write_number(row.num_nonzero, ","),
        write_number(row.macs, ","),
        write_number(row.file_bytes, ","),
        write_latency(row.latency_ms_batch1, row.latency_ms_batch1_p05, row.latency_ms_batch1_p95),
        write_latency(row.latency_ms_batch64, row.latency_ms_batch64_p05, row.latency_ms_batch64_p95),
        write_number(row.images_per_second, ",.0f"),
        write_number(row.speedup_batch1, ".2f", "x"),
        write_number(row.speedup_batch64, ".2f", "x"),
        write_number(_mega(row.peak_memory_bytes), ".1f"),
    ]


def _with_p95(median: float | None, p95: float | None) -> str:
    text, p95_text = write_latency(median, None, None), write_latency(p95, None, None)
    return f"{text} ({p95_text})" if text and p95_text else text


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _mega(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6
