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


def round_ticks(axes: "Axes", span: float) -> None:
    """Round numbers along a logarithmic x-axis, few enough not to lie on each other.

    Args:
        axes: with a logarithmic x-axis.
        span: the greatest value there over the smallest.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span > 5 else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
