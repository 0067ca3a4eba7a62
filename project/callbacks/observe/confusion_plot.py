"""A confusion matrix as a figure. As in :mod:`project.frame.plots`, matplotlib is imported when the figure is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
