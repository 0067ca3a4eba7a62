"""The compression report: one row per step, what the net has lost, and what that buys beside the best dense fp32 net.

Every number is counted or measured: bytes by ``os.stat`` of a real file, time by the clock
(:mod:`project.deployment.latency`). Speedups compare with the fastest engine of the dense fp32 net at the same batch
size, measured in the same report: not with a slow engine that would flatter every step. Where zeros buy no time, the
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
from project.frame.paths import write_whole
from project.frame.table import markdown_line, write_csv, write_latency, write_number
from project.metrics.complexity import count_macs, count_nonzero, count_parameters


@dataclass(frozen=True)
class ReportRow:
    """One step of a compression run; ``None`` where a value is unknown.

    Args:
        step: what was done, such as ``dense`` or ``prune 0.9``.
        val_accuracy, test_accuracy: fractions, 0 to 1.
        num_parameters, num_nonzero: as :mod:`project.metrics.complexity` counts them.
        sparsity: :func:`weight_sparsity`.
        macs: multiply-accumulates for one image; zeros are not skipped.
        file: the file's name.
        file_bytes: its size.
        engine: what the latencies are of; two names, "a, b", when batch 1 and batch 64 are fastest on different ones.
        latency_ms_batch1, latency_ms_batch64: medians for one batch.
        speedup_batch1, speedup_batch64: latency of the best dense fp32 engine / this latency.
        latency_ms_batch1_p05, latency_ms_batch1_p95, latency_ms_batch64_p05, latency_ms_batch64_p95: the latencies'
            5th and 95th percentile.
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
    """Share of exact zeros among all parameters of two and more dimensions, which are what pruning works on: kernels
    and matrices. Biases and norms' scales and shifts are left out. Shared parameters count once; 0 without any.
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
    """The row of one step: counts of the net, the file's size, the fastest of its engines.

    Args:
        step: what was done.
        net: takes images ``[N, C, H, W]``.
        image_shape: (C, H, W).
        file: an existing file that holds the net; the row keeps its name without the folder.
        val_accuracy, test_accuracy: fractions, 0 to 1.
        latencies: this net's, as :func:`project.deployment.latency.measure` returns them.
        reference: those of the dense fp32 net, of which the best counts; measured together with ``latencies``.
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
    """Write ``report.csv`` and ``report.md`` into ``folder``; each is the old file or the new one, never a half.

    Args:
        rows: of the table.
        folder: of the run.
        note: a sentence below the table.
    """
    end = f"\n{note}\n" if note else ""
    write_whole(Path(folder) / "report.csv", lambda part: write_csv(rows, ReportRow, part))
    write_whole(Path(folder) / "report.md", lambda part: part.write_text(to_markdown(rows) + end, encoding="utf-8"))


def read_report(path: str | os.PathLike[str]) -> list[ReportRow]:
    """The rows of a ``report.csv``, equal to those that were written.

    Raises:
        ValueError: when the file's columns are not a report's.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != list(_TYPES):
            raise ValueError(f"path is {str(path)!r}, but its columns are not those that write_report writes.")
        return [ReportRow(**{column: _parse(column, text) for column, text in row.items()}) for row in reader]


def to_markdown(rows: Sequence[ReportRow]) -> str:
    """A table, latencies as "median (5th-95th percentile)", and a sentence on each row whose zeros buy no time."""
    table = [markdown_line(_HEADS), markdown_line("---" if head in _WORDS else "---:" for head in _HEADS)]
    table += [markdown_line(_cells(row)) for row in rows]
    remarks = [f"\n{remark}" for row in rows if (remark := _remark(row))]
    return "\n".join([*table, *remarks]) + "\n"


_TYPES: dict[str, type] = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(ReportRow).items()}
"""Each column's type, ``None`` aside, in the order of the CSV."""

_WORDS = ("step", "file", "engine")
_HEADS = (
    *("step", "val accuracy", "test accuracy", "parameters", "nonzero", "sparsity", "MACs", "file", "bytes", "engine"),
    *("ms, batch 1", "ms, batch 64", "speedup, batch 1", "speedup, batch 64"),
)


def _parse(column: str, text: str) -> Any:
    return _TYPES[column](text) if text or column == "step" else None


def _cells(row: ReportRow) -> list[str]:
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
    """What a row without at least half of its weights has to admit when it is not at least a tenth faster."""
    speedups = {"batch 1": row.speedup_batch1, "batch 64": row.speedup_batch64}
    slow = [f"{value:.2f}x at {batch}" for batch, value in speedups.items() if value is not None and value < 1.1]
    if row.sparsity is None or row.sparsity < 0.5 or not slow:
        return None
    return (
        f"{row.step}: {row.sparsity:.0%} of the weights are zero, but the speed is {' and '.join(slow)}: "
        "dense kernels multiply by zeros all the same."
    )
