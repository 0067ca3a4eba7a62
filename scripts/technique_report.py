"""The report of ``scripts/compare_techniques.py``: a row for each technique and seed, a table of their means, and two
pictures of accuracy against cost.
"""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from point_labels import Label, label_points

from project.deployment.table import markdown_line, write_latency
from project.frame.plots import figure_to_image, round_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TechniqueRow:
    """One technique with one seed.

    Args:
        technique: name of the technique.
        seed: seed of the run; any int.
        val_accuracy, test_accuracy: shares of the images that are classified correctly, 0 to 1.
        macs, num_parameters, num_nonzero: numbers that :mod:`project.metrics.complexity` counts, for one image.
        packed_bytes: size of ``model.packed`` in bytes. None for int8, which is an ONNX file.
        onnx_bytes: size of the ONNX file in bytes.
        engine: name of the faster engine, whose latencies these are. Two names if batch 1 and batch 64 differ.
        latency_ms_batch1, latency_ms_batch64: median times for one batch, in milliseconds.
        latency_ms_batch1_p05, latency_ms_batch1_p95, latency_ms_batch64_p05, latency_ms_batch64_p95: 5th and 95th
            percentiles of these times, in milliseconds.
        speedup_batch1, speedup_batch64: ratios of the time of the dense net's fastest fp32 engine to this time,
            measured in the same rounds.
    """

    technique: str
    seed: int
    val_accuracy: float
    test_accuracy: float
    macs: int
    num_parameters: int
    num_nonzero: int
    packed_bytes: int | None
    onnx_bytes: int
    engine: str
    latency_ms_batch1: float
    latency_ms_batch1_p05: float
    latency_ms_batch1_p95: float
    latency_ms_batch64: float
    latency_ms_batch64_p05: float
    latency_ms_batch64_p95: float
    speedup_batch1: float
    speedup_batch64: float

    @property
    def bytes(self) -> int:
        """The size of the smallest file that holds the net."""
        return self.onnx_bytes if self.packed_bytes is None else min(self.packed_bytes, self.onnx_bytes)


_HEADS = (
    *("technique", "trained", "test accuracy, %", "val accuracy, %", "MACs, million", "nonzero parameters"),
    *("smallest file, kB", "times smaller", "ONNX file, kB", "ms, batch 1", "ms, batch 64", "speedup, batch 1"),
    *("speedup, batch 64", "engine"),
)


def to_markdown(rows: Sequence[TechniqueRow], trained: dict[str, str]) -> str:
    """Means over the seeds, with standard deviations of the accuracies; files beside the dense net's fp32 ONNX file.

    Args:
        rows: the first technique is the dense net.
        trained: of each technique, in words.
    """
    by_name = {row.technique: [r for r in rows if r.technique == row.technique] for row in rows}
    dense = statistics.mean(row.onnx_bytes for row in by_name[rows[0].technique])
    lines = [markdown_line(_HEADS), markdown_line(["---", "---", *["---:"] * (len(_HEADS) - 3), "---"])]
    for name, group in by_name.items():

        def mean(value: Callable[[TechniqueRow], float], group: list[TechniqueRow] = group) -> float:
            return statistics.mean(map(value, group))

        smallest = mean(lambda row: row.bytes)
        cells = [
            name,
            trained[name],
            _spread([100 * row.test_accuracy for row in group]),
            _spread([100 * row.val_accuracy for row in group]),
            f"{mean(lambda row: row.macs) / 1e6:.2f}",
            f"{mean(lambda row: row.num_nonzero):,.0f}",
            f"{smallest / 1e3:,.1f}",
            f"{dense / smallest:.1f}",
            f"{mean(lambda row: row.onnx_bytes) / 1e3:,.1f}",
            write_latency(
                mean(lambda row: row.latency_ms_batch1),
                mean(lambda row: row.latency_ms_batch1_p05),
                mean(lambda row: row.latency_ms_batch1_p95),
            ),
            write_latency(
                mean(lambda row: row.latency_ms_batch64),
                mean(lambda row: row.latency_ms_batch64_p05),
                mean(lambda row: row.latency_ms_batch64_p95),
            ),
            f"{mean(lambda row: row.speedup_batch1):.2f}",
            f"{mean(lambda row: row.speedup_batch64):.2f}",
            "; ".join(dict.fromkeys(row.engine for row in group)),
        ]
        lines.append(markdown_line(cells))
    return "\n".join(lines) + "\n"


def plot_techniques(rows: Sequence[TechniqueRow], cost: Callable[[TechniqueRow], float], label: str) -> "Figure":
    """Test accuracy against a cost on a logarithmic axis, means over the seeds; left and up is better.

    Args:
        rows: rows of all techniques and seeds. The first technique is the dense net.
        cost: function that gives the cost of a row; above 0.
        label: name of the cost, with its unit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    points: dict[str, tuple[float, float]] = {}
    avoid: list[tuple[float, float]] = []
    dense = rows[0].technique
    for name in dict.fromkeys(row.technique for row in rows):
        group = [row for row in rows if row.technique == name]
        accuracies = [100 * row.test_accuracy for row in group]
        x, y = points[name] = (statistics.mean(map(cost, group)), statistics.mean(accuracies))
        deviation = statistics.stdev(accuracies) if len(group) > 1 else 0.0
        avoid += [(x, y + part * deviation) for part in (-1, -0.5, 0.5, 1) if deviation]
        look: dict[str, Any] = {"marker": "o", "markersize": 5, "capsize": 2}
        if name == dense:
            look |= {"marker": "s", "markersize": 10, "markerfacecolor": "none"}
        axes.errorbar(x, y, yerr=deviation or None, **look)
    axes.set_xscale("log")
    axes.margins(0.08)
    costs = [x for x, _ in points.values()]
    round_ticks(axes, max(costs) / min(costs))
    axes.set(xlabel=label, ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    label_points(
        axes, [Label(name, *point, "0.15", 5 if name == dense else 2.5) for name, point in points.items()], avoid=avoid
    )
    return figure


def read_rows(path: Path) -> list[TechniqueRow]:
    """The rows of a ``techniques.csv``, in its order."""
    types = get_type_hints(TechniqueRow)
    with path.open(newline="", encoding="utf-8") as file:
        return [
            TechniqueRow(**{name: _parse(text, types[name]) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def draw_techniques(rows: Sequence[TechniqueRow], folder: Path) -> None:
    """Write techniques_bytes.png and techniques_latency.png into a folder.

    Args:
        rows: rows of all techniques and seeds. The first technique is the dense net.
        folder: an existing folder.
    """
    from PIL import Image

    costs: dict[str, tuple[Callable[[TechniqueRow], float], str]] = {
        "bytes": (lambda row: row.bytes / 1e3, "kilobytes of the smallest file"),
        "latency": (lambda row: row.latency_ms_batch64, "milliseconds for a batch of 64, the faster engine"),
    }
    for name, (cost, label) in costs.items():
        image = Image.fromarray(figure_to_image(plot_techniques(rows, cost, label), dpi=110))
        image.save(folder / f"techniques_{name}.png", optimize=True)


def _parse(text: str, kind: Any) -> Any:
    if kind in (int, float, str):
        return kind(text)
    return int(text) if text else None  # int | None


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
