"""Figures: images with titles, and the curves of a run. Like :mod:`project.frame.plots`, they touch no global state."""

import csv
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""The x and the y values of one line."""


def plot_images(
    images: Tensor, titles: Sequence[str] | None = None, *, columns: int = 8, heading: str | None = None
) -> "Figure":
    """A grid of images, each with a title.

    Args:
        images: images ``[N, C, H, W]`` with 1 or 3 channels, uint8 or float in [0, 1]; other floats are clipped.
        titles: text above each image, of one or two short lines.
        columns: largest number of images side by side, 1 or more.
        heading: line of text above the grid.
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


def plot_curves(metrics: "str | PathLike[str] | Mapping[str, Curve]") -> "Figure":
    """Curves over the epochs: one panel for each quantity (loss, accuracy, …), one line for each stage (train, val).

    Args:
        metrics: path of a run's ``metrics.csv``, or the curves as ``{"train/loss": (epochs, values), …}``.

    Raises:
        ValueError: if there is no curve.
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
    """The columns of a ``metrics.csv`` over its column ``epoch``, without empty cells, tests and probes."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if (
                value
                and row.get("epoch")
                and name not in ("epoch", "step")
                and not name.startswith(("test/", "probe/"))
            ):
                x, y = curves.setdefault(name, ([], []))
                x.append(float(row["epoch"]))
                y.append(float(value))
    return dict(curves)


def _pixels(images: Tensor) -> Any:
    """The images as a uint8 array ``[N, H, W]`` or ``[N, H, W, 3]``."""
    images = images.detach().cpu()
    if images.is_floating_point():
        images = images.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return images[:, 0].numpy() if images.shape[1] == 1 else images.permute(0, 2, 3, 1).numpy()


def _short(line: str, length: int = 21) -> str:
    """A line cut to the length that fits above one image."""
    return line if len(line) <= length else f"{line[: length - 1]}…"
