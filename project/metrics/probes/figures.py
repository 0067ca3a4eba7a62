"""Pictures of what the probes have measured. Like :mod:`project.frame.plots`, they touch no global state."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Mapping[int, Mapping[str, float]]
"""Values by name, for each number of steps that were taken before."""


def plot_landscape(history: History) -> "Figure":
    """Loss, change of the gradient and smoothness over the steps, as in Santurkar et al. 2018 (fig. 4).

    Args:
        history: values that :class:`project.callbacks.LandscapeProbe` has measured.
    """
    from matplotlib.figure import Figure

    steps = sorted(history)
    values = {
        name: [_finite(history[step][f"landscape/{name}"]) for step in steps]
        for name in ("loss", "loss_min", "loss_max", "gradient_change_min", "gradient_change_max", "smoothness")
    }
    marker = "o" if len(steps) < 3 else None
    figure = Figure(figsize=(12.6, 3.4), layout="constrained")
    loss, change, smoothness = figure.subplots(1, 3)
    loss.plot(steps, values["loss"], color="black", linewidth=1, marker=marker, label="at the weights")
    loss.fill_between(steps, values["loss_min"], values["loss_max"], alpha=0.35, label="along the gradient")
    loss.set_title("loss along the gradient", fontsize=11)
    loss.legend(frameon=False, fontsize=9)
    low, high = values["gradient_change_min"], values["gradient_change_max"]
    change.fill_between(steps, low, high, alpha=0.35)
    change.plot(steps, high, linewidth=1, marker=marker)
    change.set_title("change of the gradient (L2 norm)", fontsize=11)
    smoothness.plot(steps, values["smoothness"], linewidth=1.5, marker=marker)
    smoothness.set_title("effective β-smoothness", fontsize=11)
    for axis in (loss, change, smoothness):
        _dress(axis, "optimizer step")
    return figure


def plot_gradient_norms(history: History, most: int = 8) -> "Figure":
    """Norms of the gradients by depth, a line for each of some measurements, from light (early) to dark (late).

    Args:
        history: values that :class:`project.callbacks.GradientNormProbe` has measured.
        most: largest number of lines, 2 or more; the first and the last measurement are always among them.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = sorted(history)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axis = figure.subplots()
    for i, step in enumerate(steps):
        norms = [_finite(value) or math.nan for value in history[step].values()]  # a logarithm has no 0
        colour = colormaps["viridis_r"]((i + 1) / (len(steps) + 1))
        axis.plot(range(1, len(norms) + 1), norms, color=colour, linewidth=1.2, marker=".", label=f"step {step:,}")
    _dress(axis, "layer with parameters, from the input to the output")
    axis.set_ylabel("L2 norm of the gradient")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=9)
    return figure


def _dress(axis: "Axes", label: str) -> None:
    """Grid and label; a logarithmic scale if everything that is shown is above 0."""
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    if axis.dataLim.y0 > 0:
        axis.set_yscale("log")


def _finite(value: float) -> float:
    """The value, or NaN, which leaves a gap."""
    return value if math.isfinite(value) else math.nan
