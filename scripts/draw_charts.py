"""Draw the chart of docs/recipes.md from the numbers in docs/: nothing is trained or measured.

    python scripts/draw_charts.py

It reads docs/pictures/accuracy_against_bytes.csv, which repeats numbers of the documents and names their sources, and
writes docs/pictures/accuracy_against_bytes.png.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from point_labels import Label, label_points

from project.frame.plots import figure_to_image, round_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("#0067A0", "#C04F00", "#007D5B", "#5A5A5A", "#A8508A")
"""Different for any colour vision: darker shades of Okabe and Ito 2008 (https://jfly.uni-koeln.de/color), and grey."""


@dataclass(frozen=True)
class Result:
    """One point of the chart of accuracy against bytes.

    Args:
        label: name beside the point.
        net: name of the dense net that was made smaller; points of the same net have the same colour.
        dense: whether this is the dense net itself, in fp32.
        num_bytes: size of the file, or four bytes for each parameter of a dense net; above 0.
        accuracy: accuracy on the test images in percent, 0 to 100; the mean if there are several seeds.
        deviation: standard deviation over the seeds, in percent points. 0 if there is one seed.
    """

    label: str
    net: str
    dense: bool
    num_bytes: int
    accuracy: float
    deviation: float = 0.0


def read_results(path: Path) -> list[Result]:
    """The points of docs/pictures/accuracy_against_bytes.csv, in its order."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Result(
                row["label"],
                row["net"],
                row["dense"] == "yes",
                int(row["bytes"]),
                float(row["accuracy_percent"]),
                float(row["deviation_percent"] or 0),
            )
            for row in csv.DictReader(file)
        ]


def plot_results(results: Sequence[Result]) -> "Figure":
    """Test accuracy against bytes on a logarithmic axis: each net has a colour, and dense nets are hollow squares."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 6.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    nets = list(dict.fromkeys(result.net for result in results))
    labels: list[Label] = []
    avoid: list[tuple[float, float]] = []
    for result in results:
        colour = COLOURS[nets.index(result.net) % len(COLOURS)]
        look: dict[str, Any] = {"marker": "s", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6}
        look = look if result.dense else {"marker": "o", "markersize": 6}
        x, y = result.num_bytes / 1e3, result.accuracy
        axes.errorbar(x, y, yerr=result.deviation or None, color=colour, capsize=2, linewidth=1, **look)
        avoid += [(x, y + part * result.deviation) for part in (-1, -0.5, 0.5, 1) if result.deviation]
        labels.append(Label(result.label, x, y, colour, 5.5 if result.dense else 3))
    axes.set_xscale("log")
    axes.margins(x=0.06, y=0.06)
    sizes = [result.num_bytes for result in results]
    round_ticks(axes, max(sizes) / min(sizes))
    axes.tick_params(labelsize=11)
    axes.set_xlabel("kilobytes of the model file, logarithmic", fontsize=12)
    axes.set_ylabel("test accuracy on Fashion-MNIST (%)", fontsize=12)
    axes.grid(alpha=0.3)
    handles = [Line2D([], [], linewidth=6, color=colour, label=net) for net, colour in zip(nets, COLOURS, strict=False)]
    hollow: dict[str, Any] = {"color": "black", "linestyle": "none"}
    handles.append(Line2D([], [], marker="s", markersize=10, markerfacecolor="none", label="dense, fp32", **hollow))
    handles.append(Line2D([], [], marker="o", markersize=6, label="made smaller", **hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    label_points(axes, labels, avoid=avoid, fontsize=10.5)
    return figure


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder that is read and written")
    docs: Path = parser.parse_args().docs
    file = docs / "pictures/accuracy_against_bytes.csv"
    image = figure_to_image(plot_results(read_results(file)), dpi=110)
    Image.fromarray(image).save(file.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
