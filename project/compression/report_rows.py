"""The rows of the compression report: accuracy, size and speed of each step, beside the dense fp32 net.

Every number is counted or measured: bytes come from ``os.stat`` of a real file, times from the clock
(:mod:`project.deployment.latency`). A speedup compares with the fastest engine of the dense fp32 net at the same batch
size, measured in the same report. A slow engine would make every step look good. If zeros do not make a net faster, the
report says so.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from project.deployment.latency import Latency, best
from project.deployment.table import markdown_line, write_csv, write_latency, write_number
from project.frame.paths import write_whole
from project.metrics.complexity import count_macs, count_nonzero, count_parameters


@dataclass(frozen=True)
class ReportRow:
    """One step of a compression run. A value is None if it is unknown.

    Args:
        step: name of the step, such as ``dense`` or ``prune 0.9``.
        val_accuracy: accuracy on the validation images, 0 to 1.
        test_accuracy: accuracy on the test images, 0 to 1.
        num_parameters: number of parameters, as :mod:`project.metrics.complexity` counts them.
        num_nonzero: number of parameters that are not 0, counted in the same way.
        sparsity: share of zeros among the weights, 0 to 1; see :func:`weight_sparsity`.
        macs: multiply-accumulates for one image; multiplications by 0 count too.
        file: name of the file, without its folder.
        file_bytes: size of the file in bytes.
        engine: engine of the latencies. It is two names, "a, b", if batch 1 is fastest on a and batch 64 on b.
        latency_ms_batch1: median latency of one image, in ms.
        latency_ms_batch64: median latency of one batch of 64 images, in ms.
        speedup_batch1: latency of the best dense fp32 engine at batch 1, divided by ``latency_ms_batch1``.
        speedup_batch64: latency of the best dense fp32 engine at batch 64, divided by ``latency_ms_batch64``.
        latency_ms_batch1_p05: 5th percentile of the latency of one image, in ms.
        latency_ms_batch1_p95: 95th percentile of the latency of one image, in ms.
        latency_ms_batch64_p05: 5th percentile of the latency of one batch of 64 images, in ms.
        latency_ms_batch64_p95: 95th percentile of the latency of one batch of 64 images, in ms.
    """

    step: str
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    num_parameters: int | None = None
    num_nonzero: int | None = None
    sparsity: float | None = None
    macs: int | None = None
    file: str | None = None
    file_bytes: int | None = None
    engine: str | None = None
    latency_ms_batch1: float | None = None
    latency_ms_batch64: float | None = None
    speedup_batch1: float | None = None
    speedup_batch64: float | None = None
    latency_ms_batch1_p05: float | None = None
    latency_ms_batch1_p95: float | None = None
    latency_ms_batch64_p05: float | None = None
    latency_ms_batch64_p95: float | None = None


def weight_sparsity(net: nn.Module) -> float:
    """The share of exact zeros, 0 to 1, among the parameters that pruning works on: kernels and matrices.

    These are the parameters of two or more dimensions. Biases and the scales and shifts of norms do not count. A
    parameter that several layers share counts once. Without such parameters the share is 0.

    Args:
        net: net whose parameters are counted.
    """
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    num_weights = sum(weight.numel() for weight in weights)
    return 1 - sum(int(torch.count_nonzero(weight)) for weight in weights) / num_weights if num_weights else 0.0


def describe(
    step: str,
    net: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    file: str | os.PathLike[str] | None = None,
    val_accuracy: float | None = None,
    test_accuracy: float | None = None,
    latencies: Mapping[tuple[str, int], Latency] | None = None,
    reference: Mapping[tuple[str, int], Latency] | None = None,
) -> ReportRow:
    """The row of one step: counts of the net, the size of its file, and the times of its fastest engine.

    Args:
        step: name of the step, such as ``prune 0.9``.
        net: net that takes images ``[N, C, H, W]``.
        image_shape: shape (C, H, W) of one image.
        file: existing file that holds the net; the row has its name without the folder. None means no file.
        val_accuracy: accuracy on the validation images, 0 to 1; None if it is unknown.
        test_accuracy: accuracy on the test images, 0 to 1; None if it is unknown.
        latencies: latencies of this net, as :func:`project.deployment.latency.measure` returns them. None means none.
        reference: latencies of the dense fp32 net, measured together with ``latencies``; the best one counts. None
            leaves the speedups out.
    """
    latencies, reference = latencies or {}, reference or {}
    own, dense = best(latencies), best(reference)
    columns: dict[str, Any] = {}
    for batch in (1, 64):
        if batch not in own:
            continue
        latency = latencies[own[batch], batch]
        name = f"latency_ms_batch{batch}"
        columns |= {name: latency.median_ms, f"{name}_p05": latency.p05_ms, f"{name}_p95": latency.p95_ms}
        if batch in dense:
            columns[f"speedup_batch{batch}"] = reference[dense[batch], batch].median_ms / latency.median_ms
    return ReportRow(
        step,
        val_accuracy=val_accuracy,
        test_accuracy=test_accuracy,
        num_parameters=count_parameters(net),
        num_nonzero=count_nonzero(net),
        sparsity=weight_sparsity(net),
        macs=count_macs(net, image_shape),
        file=Path(file).name if file is not None else None,
        file_bytes=Path(file).stat().st_size if file is not None else None,
        engine=", ".join(dict.fromkeys(own[batch] for batch in (1, 64) if batch in own)) or None,
        **columns,
    )


def write_report(rows: Sequence[ReportRow], folder: str | os.PathLike[str], note: str | None = None) -> None:
    """Write ``report.csv`` and ``report.md``. If the process is stopped, each file is complete, old or new.

    Args:
        rows: rows of the table, in order.
        folder: folder of the run, where the files are written.
        note: sentence below the table in ``report.md``; None for no sentence.
    """
    end = f"\n{note}\n" if note else ""
    write_whole(Path(folder) / "report.csv", lambda part: write_csv(rows, ReportRow, part))
    write_whole(Path(folder) / "report.md", lambda part: part.write_text(to_markdown(rows) + end, encoding="utf-8"))


def read_report(path: str | os.PathLike[str]) -> list[ReportRow]:
    """The rows of a ``report.csv``, equal to those that were written.

    Args:
        path: path of an existing ``report.csv``.

    Raises:
        ValueError: if the columns of the file are not those of a report.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != list(_TYPES):
            raise ValueError(f"path is {str(path)!r}, but its columns are not those of a report: give a report.csv.")
        return [ReportRow(**{column: _parse(column, text) for column, text in row.items()}) for row in reader]


def to_markdown(rows: Sequence[ReportRow]) -> str:
    """The Markdown table, with latencies as "median (5th-95th percentile)".

    Below the table there is a sentence for each row whose zeros do not make the net faster.

    Args:
        rows: rows of the table, in order.
    """
    table = [markdown_line(_HEADS), markdown_line("---" if head in _WORDS else "---:" for head in _HEADS)]
    table += [markdown_line(_cells(row)) for row in rows]
    remarks = [f"\n{remark}" for row in rows if (remark := _remark(row))]
    return "\n".join([*table, *remarks]) + "\n"


_TYPES: dict[str, type] = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(ReportRow).items()}
"""The type of each column without ``None``, in the order of the CSV."""

_WORDS = ("step", "file", "engine")
_HEADS = (
    *("step", "val accuracy", "test accuracy", "parameters", "nonzero", "sparsity", "MACs", "file", "bytes", "engine"),
    *("ms, batch 1", "ms, batch 64", "speedup, batch 1", "speedup, batch 64"),
)


def _parse(column: str, text: str) -> Any:
    """The value of a cell of the CSV. An empty cell is None, but the name of a step may be empty."""
    return _TYPES[column](text) if text or column == "step" else None


def _cells(row: ReportRow) -> list[str]:
    """The texts of a row of the Markdown table, in the order of its heads."""
    return [
        row.step,
        write_number(row.val_accuracy, ".4f"),
        write_number(row.test_accuracy, ".4f"),
        write_number(row.num_parameters, ","),
        write_number(row.num_nonzero, ","),
        write_number(row.sparsity, ".3f"),
        write_number(row.macs, ","),
        row.file or "",
        write_number(row.file_bytes, ","),
        row.engine or "",
        write_latency(row.latency_ms_batch1, row.latency_ms_batch1_p05, row.latency_ms_batch1_p95),
        write_latency(row.latency_ms_batch64, row.latency_ms_batch64_p05, row.latency_ms_batch64_p95),
        write_number(row.speedup_batch1, ".2f", "x"),
        write_number(row.speedup_batch64, ".2f", "x"),
    ]


def _remark(row: ReportRow) -> str | None:
    """The sentence for a row with at least half of its weights 0 and a speedup below 1.1; None for other rows."""
    speedups = {"batch 1": row.speedup_batch1, "batch 64": row.speedup_batch64}
    slow = [f"{value:.2f}x at {batch}" for batch, value in speedups.items() if value is not None and value < 1.1]
    if row.sparsity is None or row.sparsity < 0.5 or not slow:
        return None
    return (
        f"{row.step}: {row.sparsity:.0%} of the weights are zero, but the speed is {' and '.join(slow)}: "
        "dense kernels multiply by zeros too."
    )
