"""A confusion matrix as a figure. As in :mod:`project.frame.plots`, matplotlib is imported when the figure is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_confusion_matrix(matrix: Tensor, class_names: Sequence[str]) -> "Figure":
    """A confusion matrix: a row for each true class, a column for each predicted class.

    The colour is the share of the true class. Its scale is a square root, so that the few mistakes are visible. Up to
    25 classes have their counts in the cells.

    Args:
        matrix: counts of the pairs of true and predicted class, ``[K, K]``.
        class_names: names of the K classes.
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
    """Write the counts into the cells, in white on dark cells. Cells with 0 stay empty."""
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
