"""Figures of what a compression cost and bought: accuracy against weights left, bytes and latency.

As in :mod:`project.frame.plots`, nothing is kept in pyplot's state, and matplotlib is imported with the first figure.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from project.frame.plots import round_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from project.compression.report_rows import ReportRow
    from project.deployment.benchmark.rows import BenchmarkRow

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Told apart with any colour vision: Okabe and Ito 2008 (https://jfly.uni-koeln.de/color), and grey."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


def plot_levels(points: Sequence[tuple[float, float]], score: str) -> "Figure":
    """A score against the share of weights left, on a logarithmic axis that runs from dense to sparse.

    Args:
        points: pairs of the share of weights left, in (0, 1], and the score, one for each level.
        score: name of the score, for the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([100 * left for left, _ in points], [value for _, value in points], marker="o", markersize=4)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks([100 * left for left, _ in points], [f"{100 * left:.3g}" for left, _ in points])
    axes.minorticks_off()
    axes.set_xlabel("weights left (%)")
    axes.set_ylabel(f"best {score}")
    axes.grid(alpha=0.3)
    return figure


def plot_benchmark(rows: "Sequence[BenchmarkRow]") -> "Figure":
    """Accuracy against latency at batch 64, and accuracy against bytes. Points further left and up are better.

    A line through a point runs from the 5th to the 95th percentile of the latency. Each engine or model file has its
    own marker. If there are several runs, each run has its own colour, and the legend explains colours and markers
    separately. Points with the same bytes and accuracy are drawn side by side on a grey line. Rows without values are
    left out.

    Args:
        rows: rows that :func:`project.deployment.benchmark.measure.benchmark` returns.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in rows if row.test_accuracy is not None and row.latency_ms_batch64 and row.file_bytes]
    labels, runs = list(dict.fromkeys(row.label for row in rows)), list(dict.fromkeys(row.run for row in rows))
    several = len(runs) > 1
    num_lines = math.ceil((len(labels) + several * len(runs)) / 4)
    figure = Figure(figsize=(10, 4.2 + 0.2 * num_lines), layout="constrained")
    by_time, by_bytes = figure.subplots(1, 2, sharey=True)
    accuracies = [100 * (row.test_accuracy or 0) for row in rows]
    styles = []
    for row in rows:
        marker = labels.index(row.label)
        number = runs.index(row.run) if several else marker
        colour, shape = _COLOURS[number % len(_COLOURS)], _MARKERS[marker % len(_MARKERS)]
        styles.append({"color": colour, "marker": shape, "label": row.label})
    times, sizes = [row.latency_ms_batch64 or 0 for row in rows], [(row.file_bytes or 0) / 1e6 for row in rows]
    spreads = [(row.latency_ms_batch64_p05 or 0, row.latency_ms_batch64_p95 or 0) for row in rows]
    _draw_points(by_time, times, accuracies, styles)
    _draw_points(by_bytes, sizes, accuracies, styles, apart=True)
    for spread, accuracy, style in zip(spreads, accuracies, styles, strict=True):
        by_time.plot(spread, (accuracy, accuracy), color=style["color"], linewidth=1)
    by_time.set_xlim(min(min(spreads)) / 1.1, max(max(spreads, key=max)) * 1.1)
    by_bytes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    by_time.set(xlabel="milliseconds for a batch of 64", ylabel="test accuracy (%)")
    by_bytes.set(xlabel="megabytes of weights or model file (on a grey line: the same)")
    middle, half = (min(accuracies) + max(accuracies)) / 2, max(0.6, 0.6 * (max(accuracies) - min(accuracies)))
    by_time.set_ylim(middle - half, middle + half)  # at least 1.2 points: noise shall not fill the picture
    handles = [line for line in by_time.lines if line.get_marker() != "None"]
    if several:
        hollow: dict[str, Any] = {"color": "black", "linestyle": "none", "markerfacecolor": "none"}
        handles = [Line2D([], [], linewidth=6, color=_COLOURS[i % len(_COLOURS)], label=r) for i, r in enumerate(runs)]
        handles += [Line2D([], [], marker=_MARKERS[i % len(_MARKERS)], label=x, **hollow) for i, x in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def plot_report(rows: "Sequence[ReportRow]") -> "Figure":
    """Test accuracy of each step of a compression against its bytes and, where measured, its latency at batch 64.

    The bytes are the size of the model file. A checkpoint also holds the optimizer, so it counts four bytes for each
    parameter instead.

    Args:
        rows: rows of a run's report, in the order of the report.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.test_accuracy is not None and row.num_parameters]
    styles = [
        {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "label": row.step}
        for i, row in enumerate(rows)
    ]
    accuracies = [100 * (row.test_accuracy or 0) for row in rows]
    sizes = [
        (4 * (row.num_parameters or 0) if (row.file or "").endswith(".ckpt") else row.file_bytes or 0) / 1e3
        for row in rows
    ]
    timed = [index for index, row in enumerate(rows) if row.latency_ms_batch64]
    figure = Figure(figsize=(10 if timed else 6, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    _draw_points(axes[0], sizes, accuracies, styles, apart=True)
    axes[0].set(xlabel="kilobytes of weights or model file", ylabel="test accuracy (%)")
    axes[0].set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    if timed:
        times = [rows[index].latency_ms_batch64 or 0 for index in timed]
        _draw_points(axes[1], times, [accuracies[i] for i in timed], [styles[i] for i in timed], apart=True)
        axes[1].set(xlabel="milliseconds for a batch of 64")
        axes[1].set_xlim(min(times) / 1.2, max(times) * 1.2)
    middle, half = (min(accuracies) + max(accuracies)) / 2, max(0.6, 0.6 * (max(accuracies) - min(accuracies)))
    axes[0].set_ylim(middle - half, middle + half)  # at least 1.2 points: noise shall not fill the picture
    handles = [line for line in axes[0].lines if not str(line.get_label()).startswith("_")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _draw_points(
    axis: "Axes", x: Sequence[float], y: Sequence[float], styles: Sequence[dict[str, Any]], apart: bool = False
) -> None:
    """Draw hollow markers over a logarithmic axis with round ticks.

    With ``apart``, markers that would cover each other are drawn side by side.
    """
    from matplotlib.transforms import ScaledTranslation

    groups: list[list[int]] = []
    for index in range(len(x)):
        near = (g for g in groups if abs(math.log(x[index] / x[g[0]])) < 0.03 and abs(y[index] - y[g[0]]) < 0.04)
        group = next(near, None) if apart else None
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    look: dict[str, Any] = {"linestyle": "", "markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.6}
    for group in groups:
        if len(group) > 1:  # where they all belong
            axis.plot([x[group[0]]], [y[group[0]]], marker="|", markersize=30, color="grey", zorder=1)
        for place, index in enumerate(group):
            inches = 0.12 * (place - (len(group) - 1) / 2)
            aside = axis.transData + ScaledTranslation(inches, 0, axis.figure.dpi_scale_trans)
            axis.plot([x[index]], [y[index]], transform=aside, **(look | styles[index]))
    axis.set_xscale("log")
    round_ticks(axis, max(x) / min(x))
    axis.grid(alpha=0.3)
