"""The page of a study with its table, picture and CSV file, and the index of all studies.

A page is made by code alone from the runs. It has no dates and no numbers that somebody typed.
"""

import argparse
import csv
import shlex
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from verdicts import Answer, Claim, Finding, mean

from project.deployment.table import markdown_line
from project.frame.environment import cpu_abilities, cpu_model
from project.frame.paths import write_whole
from project.frame.plots import figure_to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/studies"
ROOMS = "tuning, compression, deployment"
"""Optional folders of the package that all studies need."""
HELPERS = ("evidence", "foreign_nets", "pages", "plain_nets", "verdicts")
"""Files beside the studies that are no studies."""
FURTHER = {
    "lottery_ticket": (
        "Lottery tickets: what to do after pruning, level by level",
        "compression/pruning, models/zoo",
    ),
    "quantization": (
        "Int8 beside ONNX Runtime's quantizer and NNCF",
        "deployment/int8, deployment/benchmark, compression/pruning, compression/distillation, compression/qat",
    ),
}
"""Studies whose pages people write: the name, which is that of the page, the title, and the rooms that it needs."""

_INDEX = """Each study is one command, and its page is made by its code alone. A claim is *reproduced* if what it says
holds in each setting that decides, *mixed* if only a part of it holds, or if it holds in some settings, else *not
reproduced*. A difference holds if it is in the claimed direction by more than two standard errors over the seeds; where
a page has another rule, it says so. With three seeds, chance alone makes such a difference in 9 % of the cases.
All nets and data are small: a verdict is about these settings, and each page says what was scaled down."""


@dataclass
class Page:
    """The page of one study.

    Args:
        name: name of the study, and of its files in the output folder.
        title: heading of the page.
        args: options of the command, as ``evidence.options`` gives them.
        rooms: optional folders of the package that the study needs beside :data:`ROOMS`, separated by commas.
    """

    name: str
    title: str
    args: argparse.Namespace
    rooms: str = ""
    lines: list[str] = field(default_factory=list)
    """The page so far, without its head and its verdicts."""
    findings: list[Finding] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    """The rows of the CSV file."""

    def note(self, part: str, setting: str, values: Sequence[float]) -> None:
        """Add numbers to the rows of the CSV file.

        Args:
            part: name of the part of the study.
            setting: name of the setting.
            values: one number a seed.
        """
        for seed, value in zip(self.args.seeds, values, strict=True):
            self.table.append({"part": part, "setting": setting, "seed": seed, "value": value})

    def say(self, text: str) -> None:
        """Add a paragraph to the page."""
        self.lines += ["", *textwrap.wrap(" ".join(text.split()), width=120, break_long_words=False)]

    def head(self, text: str) -> None:
        """Add a heading of the second level to the page."""
        self.lines += ["", f"## {text}"]

    def show(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table to the page."""
        self.lines += ["", markdown_line(columns), markdown_line(["---"] * len(columns)), *map(markdown_line, rows)]

    def find(self, claim: Claim, answer: Answer, because: str) -> None:
        """Add a verdict."""
        self.findings.append(Finding(claim, answer, " ".join(because.split())))

    def write(self, draw: Callable[[Any], None], caption: str, size: tuple[float, float] = (9.0, 4.0)) -> None:
        """Write the page, the picture, the CSV file and the index.

        Args:
            draw: function that draws into an empty figure of matplotlib.
            caption: one sentence below the picture.
            size: width and height of the picture in inches.
        """
        folder = self.args.output
        folder.mkdir(parents=True, exist_ok=True)
        _write_picture(draw, folder / f"{self.name}.png", size)
        columns = list(dict.fromkeys(key for row in self.table for key in row))
        _write_csv(folder / f"{self.name}.csv", columns, self.table)
        words = ["python", f"scripts/studies/{self.name}.py", *self.args.changes]
        cpu, version = f"{cpu_model() or 'unknown processor'} ({cpu_abilities()})", torch.__version__.partition("+")[0]
        seeds = f"{len(self.args.seeds)} seeds ({', '.join(map(str, self.args.seeds))})"
        about = (
            f"`{shlex.join(words)}` made this page: {seeds}, {cpu}, one thread for each run, torch {version}. ± is the"
            f" standard deviation over the seeds. The numbers are in [{self.name}.csv]({self.name}.csv)."
        )
        page = [f"<!-- room: {_joined(ROOMS, self.rooms)} -->", f"# {self.title}", "", *textwrap.wrap(about, width=120)]
        page += ["", "| | claim | verdict | because | source |", "|---|---|---|---|---|"]
        page += [
            markdown_line([str(number), each.claim.text, f"**{each.answer}**", each.because, each.claim.source])
            for number, each in enumerate(self.findings, 1)
        ]
        page += ["", f"![{caption}]({self.name}.png)", "", *textwrap.wrap(caption, width=120), *self.lines]
        write_whole(folder / f"{self.name}.md", lambda part: part.write_text("\n".join(page) + "\n", encoding="utf-8"))
        self._write_index(folder)

    def _write_index(self, folder: Path) -> None:
        """Write the verdicts of this study into ``verdicts.csv``, and all verdicts into ``README.md``."""
        path = folder / "verdicts.csv"
        rows = [row for row in read_csv(path) if row["study"] != self.name]
        for number, each in enumerate(self.findings, 1):
            rows.append(
                {
                    "study": self.name,
                    "title": self.title,
                    "rooms": _joined(ROOMS, self.rooms),
                    "number": str(number),
                    "claim": each.claim.text,
                    "verdict": each.answer,
                    "because": each.because,
                }
            )
        rows.sort(key=lambda row: (row["study"], int(row["number"])))
        _write_csv(path, ["study", "title", "rooms", "number", "claim", "verdict", "because"], rows)
        page = [f"<!-- room: {ROOMS} -->", "# Studies", "", *textwrap.wrap(_INDEX, width=120)]
        for study in dict.fromkeys(row["study"] for row in rows):
            mine = [row for row in rows if row["study"] == study]
            page += [
                "",
                f"<!-- room: {mine[0]['rooms']} -->",
                f"## [{mine[0]['title']}]({study}.md)",
                "",
                "| | claim | verdict | because |",
                "|---|---|---|---|",
            ]
            page += [
                markdown_line([row["number"], row["claim"], f"**{row['verdict']}**", row["because"]]) for row in mine
            ]
            page.append("<!-- /room -->")
        page += ["", "## Further studies", "", "These have pages of their own kind:", ""]
        page += [
            f"- [{title}](../{name}.md): `python scripts/studies/{name}.py` <!-- room: {rooms} -->"
            for name, (title, rooms) in FURTHER.items()
        ]
        write_whole(folder / "README.md", lambda part: part.write_text("\n".join(page) + "\n", encoding="utf-8"))


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_seeds(axes: "Axes", x: Sequence[float], rows: Sequence[Sequence[float]], label: str, color: str) -> None:
    """Draw one faint line a seed, and their mean as a strong line.

    Args:
        axes: axes of matplotlib.
        x: positions of the points.
        rows: one row of values a seed.
        label: text of the legend.
        color: a colour of matplotlib, such as ``C0``.
    """
    for row in rows:
        axes.plot(x, row, color=color, linewidth=0.6, alpha=0.35)
    means = [mean(column) for column in zip(*rows, strict=True)]
    axes.plot(x, means, color=color, linewidth=1.6, label=label)


def _write_picture(draw: Callable[[Any], None], path: Path, size: tuple[float, float]) -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    dpi = min(110, int(1200 / size[0]))  # as wide as a page shows it
    image = Image.fromarray(figure_to_image(figure, dpi=dpi)).quantize(256)  # a small file
    write_whole(path, lambda part: image.save(part, format="PNG", optimize=True))


# -- files ------------------------------------------------------------------------------------------------------------


def _joined(*names: str) -> str:
    return ", ".join(filter(None, names))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})

    write_whole(path, write)
