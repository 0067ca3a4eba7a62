"""What ``scripts/compare_techniques.py`` leaves: a row for each technique and seed, a table of their means, and two
pictures of accuracy against what it costs.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from project.deployment.table import markdown_line, write_latency
from project.frame.plots import round_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TechniqueRow:
    """One technique with one seed.

    Args:
        technique: its name.
        seed: of the run.
        val_accuracy, test_accuracy: fractions, 0 to 1.
        macs, num_parameters, num_nonzero: as :mod:`project.metrics.complexity` counts them.
        packed_bytes: of ``model.packed``; ``None`` for int8, which is an ONNX file.
        onnx_bytes: of the ONNX file.
        engine: what the latencies are of, the faster one; two names where batch 1 and batch 64 differ.
        latency_ms_batch1, latency_ms_batch64: medians for one batch.
        latency_ms_batch1_p05, latency_ms_batch1_p95, latency_ms_batch64_p05, latency_ms_batch64_p95: their 5th and
            95th percentile.
        speedup_batch1, speedup_batch64: over the dense net's fastest fp32 engine in the same rounds.
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
        """Of the smallest file that holds the net."""
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
        rows: as above.
        cost: of a row.
        label: what the cost is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    points: dict[str, tuple[float, float]] = {}
    colours: dict[str, Any] = {}
    for name in dict.fromkeys(row.technique for row in rows):
        group = [row for row in rows if row.technique == name]
        accuracies = [100 * row.test_accuracy for row in group]
        points[name] = (statistics.mean(map(cost, group)), statistics.mean(accuracies))
        deviation = statistics.stdev(accuracies) if len(group) > 1 else None
        marker = "s" if name == rows[0].technique else "o"
        colours[name] = axes.errorbar(*points[name], yerr=deviation, marker=marker, markersize=5, capsize=2)[
            0
        ].get_color()
    # Points lie close together: the names stand beside the axes, in the points' order, with a line to each.
    for place, name in enumerate(sorted(points, key=lambda name: points[name][1])):
        axes.annotate(
            name,
            points[name],
            (1.06, (place + 0.5) / len(points)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.7, "shrinkB": 3, "relpos": (0, 0.5)},
        )
    axes.set_xscale("log")
    axes.margins(0.08)
    costs = [x for x, _ in points.values()]
    round_ticks(axes, max(costs) / min(costs))
    axes.set(xlabel=label, ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    return figure


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
