"""Figures: images with titles, a confusion matrix, a run's curves.

They are built on :class:`matplotlib.figure.Figure` directly, so nothing is kept in pyplot's global state, no display
is needed and threads may draw. matplotlib is imported when the first figure is drawn.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from project.metrics.benchmark import BenchmarkRow
    from project.metrics.report import ReportRow

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y of one line."""


def plot_images(
    images: Tensor, titles: Sequence[str] | None = None, *, columns: int = 8, heading: str | None = None
) -> "Figure":
    """A grid of images, each with a title.

    Args:
        images: ``[N, C, H, W]`` with C of 1 or 3, uint8 or floats in [0, 1]; floats outside are clipped.
        titles: one for each image; of one or two short lines.
        columns: images side by side.
        heading: a line above all.
    """
    from matplotlib.figure import Figure

    pixels = _pixels(images)
    columns = max(1, min(columns, len(pixels)))
    rows = max(1, math.ceil(len(pixels) / columns))
    lines = max((title.count("\n") + 1 for title in titles or ()), default=0)
    figure = Figure(
        figsize=(1.35 * columns, (1.2 + 0.17 * lines) * rows + (0.35 if heading else 0)), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for index, (axis, image) in enumerate(zip(axes, pixels, strict=False)):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if titles:
            axis.set_title("\n".join(map(_short, titles[index].split("\n"))), fontsize=8, pad=3)
    if heading:
        figure.suptitle(heading, fontsize=10)
    return figure


def plot_confusion_matrix(matrix: Tensor, class_names: Sequence[str]) -> "Figure":
    """True classes down, predicted ones across. Colour is the share of the true class, on a square-root scale, since
    the few mistakes are what one looks for; up to 25 classes have their counts written in.

    Args:
        matrix: counts ``[K, K]``.
        class_names: K names.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = matrix.detach().cpu().double()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    num_classes, few = len(counts), len(counts) <= 25
    side = 3 + 0.55 * num_classes if few else min(40.0, 4 + 0.16 * num_classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    if few:
        axis.set_xticks(range(num_classes), class_names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_yticks(range(num_classes), class_names, fontsize=9)
        _write_counts(axis, counts, shares)
    elif num_classes <= 200:  # more names than that would lie on each other
        axis.set_xticks(range(num_classes), class_names, rotation=90, fontsize=7)
        axis.set_yticks(range(num_classes), class_names, fontsize=7)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    total = counts.sum().item()
    if total:
        correct = counts.trace().item()
        axis.set_title(f"{correct:.0f} of {total:.0f} right: {correct / total:.2%}", fontsize=11)
    figure.colorbar(picture, ax=axis, label="share of the true class", shrink=0.6, aspect=30)
    return figure


def plot_curves(metrics: "str | PathLike[str] | Mapping[str, Curve]") -> "Figure":
    """One panel for each quantity (loss, accuracy, …), one line for each stage (train, val), over the epochs.

    Args:
        metrics: ``metrics.csv`` of a run, or ``{"train/loss": (epochs, values), …}``.

    Raises:
        ValueError: when there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = dict(metrics) if isinstance(metrics, Mapping) else read_curves(metrics)
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        stage, _, quantity = name.partition("/")
        panels.setdefault(quantity or stage, {})[stage] = curve
    if not panels:
        raise ValueError(
            f"metrics is {str(metrics)!r}, but it holds no curve such as train/loss: name a run's metrics.csv."
        )
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (quantity, lines) in zip(axes, panels.items(), strict=False):
        for stage, (x, y) in lines.items():
            axis.plot(x, y, label=stage, linewidth=1.5, marker="o" if len(x) < 3 else None)
        axis.set_title(quantity, fontsize=11)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    return figure


def plot_levels(points: Sequence[tuple[float, float]], score: str) -> "Figure":
    """A score against the share of weights left, on a logarithmic axis that runs from dense to sparse.

    Args:
        points: (share of weights left in (0, 1], score), level by level.
        score: its name.
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
    """Accuracy against latency at batch 64, with the 5th to 95th percentile, and against bytes: left and up is better.

    Each engine or model file has its marker; with several runs, each run has its colour, and the legend explains
    colours and markers apart. Points of the same bytes and accuracy stand side by side on a grey line. Rows without
    values are left out.

    Args:
        rows: of :func:`project.benchmark.benchmark`.
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

    The bytes are a model file's; of a checkpoint, which also holds the optimizer, four for each parameter.

    Args:
        rows: of a run's report, in its order.
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


def read_curves(path: str | PathLike[str]) -> dict[str, Curve]:
    """The columns of a ``metrics.csv`` over its ``epoch`` column; empty cells, and what test wrote, are left out."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if value and row.get("epoch") and name not in ("epoch", "step") and not name.startswith("test/"):
                x, y = curves.setdefault(name, ([], []))
                x.append(float(row["epoch"]))
                y.append(float(value))
    return dict(curves)


def figure_to_image(figure: "Figure", dpi: int = 100) -> Any:
    """Pixels of a figure as a uint8 array ``[H, W, 3]``: what ``SummaryWriter.add_image(…, dataformats="HWC")``
    takes.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _pixels(images: Tensor) -> Any:
    """uint8 array ``[N, H, W]`` or ``[N, H, W, 3]``."""
    images = images.detach().cpu()
    if images.is_floating_point():
        images = images.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return images[:, 0].numpy() if images.shape[1] == 1 else images.permute(0, 2, 3, 1).numpy()


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Told apart with any colour vision: Okabe and Ito 2008 (https://jfly.uni-koeln.de/color), and grey."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")


def _draw_points(
    axis: "Axes", x: Sequence[float], y: Sequence[float], styles: Sequence[dict[str, Any]], apart: bool = False
) -> None:
    """Hollow markers over a logarithmic axis with round ticks; ``apart`` sets those side by side that would lie on each
    other.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
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
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(x) > 5 * min(x) else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)


def _short(line: str, length: int = 21) -> str:
    """What fits above one image."""
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _write_counts(axis: "Axes", counts: Tensor, shares: Tensor) -> None:
    """Counts in the cells, white on dark; zeros stay empty."""
    for true, predicted in counts.nonzero().tolist():
        axis.text(
            predicted,
            true,
            f"{counts[true, predicted]:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shares[true, predicted] > 0.3 else "black",
        )
