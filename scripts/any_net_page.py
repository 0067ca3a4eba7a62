"""The page of scripts/any_net.py: a table of all cells, the refusals as footnotes, and a table of memory and time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date

from any_net_cells import CELLS, Cell

from project.deployment.table import markdown_line
from project.frame.environment import describe_environment

MAX_GROWTH_MB = 200
"""What a process may hold more at its end than after its first net."""


@dataclass
class Row:
    """What one net's process has told.

    Args:
        net: name of the net.
        cells: the cells, in the order of the columns.
        parameters: number of parameters.
        shape: shape (C, H, W) of an image.
        before_mb, after_mb: memory of the process after its first small net, and at its end.
    """

    net: str
    cells: list[Cell]
    parameters: int = 0
    shape: tuple[int, ...] = ()
    before_mb: float = 0.0
    after_mb: float = 0.0

    @property
    def failures(self) -> Iterator[str]:
        for cell in self.cells:
            if cell.status == "failed":
                yield f"{self.net}, {CELLS[cell.name]}: {cell.text}"
        if self.after_mb - self.before_mb > MAX_GROWTH_MB:
            yield f"{self.net}: the process keeps {self.after_mb - self.before_mb:.0f} MB"


def to_markdown(rows: Sequence[Row], cells: Sequence[str], command: str) -> str:
    """The page: a table of all cells, the refusals as footnotes, and a table of memory and time."""
    machine = describe_environment()
    packages = [
        f"{name} {machine['packages'][name]}" for name in ("torch", "onnxruntime") if name in machine["packages"]
    ]
    heads = ["net", *(CELLS[cell] for cell in cells)]
    lines = [markdown_line(heads), markdown_line(["---"] * len(heads))]
    notes: list[str] = []
    for row in rows:
        found = {cell.name: cell for cell in row.cells}
        words = [row.net]
        for name in cells:
            cell = found.get(name, Cell(name, "failed", "it was not run"))
            if cell.status == "works":
                words.append(cell.text)
                continue
            notes.append(f"{len(notes) + 1}. {row.net}, {CELLS[name]}: {' '.join(cell.text.split())}")
            words.append(f"{'**failed**' if cell.status == 'failed' else cell.status} ({len(notes)})")
        lines.append(markdown_line(words))
    costs = [markdown_line(["net", "parameters", "image", "seconds", "slowest cell, s", "peak, MB", "kept, MB"])]
    costs.append(markdown_line(["---", *["---:"] * 6]))
    for row in rows:
        seconds = [cell.seconds for cell in row.cells]
        peak = max((cell.peak_mb for cell in row.cells), default=0)
        values = [f"{row.parameters:,}", "x".join(map(str, row.shape)), f"{sum(seconds):.0f}", f"{max(seconds):.0f}"]
        kept = row.after_mb - row.before_mb
        mark = "**" if kept > MAX_GROWTH_MB else ""
        costs.append(markdown_line([row.net, *values, f"{peak:.0f}", f"{mark}{kept:+.0f}{mark}"]))
    counts = [sum(cell.status == status for row in rows for cell in row.cells) for status in ("works", "refused")]
    return PAGE.format(
        rooms=", ".join(ROOMS),
        command=command,
        day=date.today(),
        machine=f"{machine['cpu']}, one thread, {', '.join(packages)}",
        works=counts[0],
        refused=counts[1],
        all=len(rows) * len(cells),
        cells="\n".join(lines),
        notes="\n".join(notes) or "None.",
        costs="\n".join(costs),
    )


ROOMS = [
    *(f"compression/{name}" for name in ("pruning", "thinning", "weight_sharing", "low_rank", "low_bit", "qat")),
    *("compression/winograd", "deployment/int8", "deployment/packed", "deployment/benchmark"),
]
"""Folders of the package without which the page has no use."""
PAGE = """<!-- room: {rooms} -->
# Any net: what works

`{command}`, {day}, {machine}. The command ends with status 1 if a cell fails.

Of {all} cells {works} work and {refused} are refused with a reason. Each net is named in a configuration, as
[your net](your_net.md) shows; `scripts/any_net.py` has its arguments, such as its width. It is trained for a few epochs
on scikit-learn's digits in colour, ten classes. Each technique starts from this fit and trains for a few batches more.
So an accuracy shows that a technique works, not what it can reach. One near 10 % is chance: some nets need more than a
few batches to recover from 70 % zeros or from ternary weights.

{cells}

## How to read a cell

- An accuracy is that of the test images. Int8 and four bits have that of the file and that of the fp32 net.
- ONNX and pt2: largest difference between a logit of the file and of the net, as a share of the largest logit.
- benchmark: multiply-accumulates of an image, within 1 % of those that torch counts.
- weights pruned: 70 % of the weights are zero, at the places that the masks say.
- units pruned, thinned: 30 % of the units of each layer are removed where this is possible; the
  multiply-accumulates that are left, and the largest difference of a logit between thinned and masked net (at most
  1e-5 of the largest; in double precision where the rounding of float32 alone is larger).
- shared, packed: fp32 bytes of the parameters over bytes of the packed file. The file holds the weights to the bit.
- low rank: the multiply-accumulates that are left, at most 70 %.
- ternary, packed: the share of all parameters that are ternary weights. The packed file holds them to the bit.
- four bits: bytes of the fp32 ONNX file over bytes of the file.
- Winograd: number of replaced convolutions, and the largest difference of a logit, as a share of the largest.
- resume: a run that is stopped after an epoch and resumed ends in the same bits as a run without a stop.

## Refused

{notes}

## Memory and time

Each net has a process of its own, which trains and exports a small net first, and again at the end. Peak is the largest
memory of the process. Kept is by how much its memory grew from the first small net to the last one, both after garbage
collection and `malloc_trim`. Libraries that the cells between them load count, too. More than 200 MB is in bold and
counts as a failure. Seconds are processor time.

{costs}
"""
