"""The comparison of techniques: means over seeds, how many times smaller, and names that can be read in the picture."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from technique_report import TechniqueRow, plot_techniques, read_rows, to_markdown

from project.deployment.table import write_csv

DENSE = TechniqueRow(
    *("dense", 0, 0.95, 0.94, 12_000_000, 400_000, 400_000, 1_400_000, 1_600_000, "onnxruntime"),
    *(1.0, 0.9, 1.2, 30.0, 29.0, 33.0, 1.0, 1.0),
)
NAMES = (
    "weights pruned",
    "units pruned",
    "weights shared",
    "int8",
    "low rank",
    "ternary",
    "binary",
    "XNOR",
    "Winograd",
)


def rows() -> list[TechniqueRow]:
    """Nine techniques that differ by little, two seeds."""
    found = []
    for seed in (0, 1):
        found.append(replace(DENSE, seed=seed, test_accuracy=0.94 + 0.002 * seed))
        for number, name in enumerate(NAMES):
            packed = None if name == "int8" else 90_000 + 3_000 * number
            row = replace(DENSE, technique=name, seed=seed, packed_bytes=packed, test_accuracy=0.939 - 0.0002 * number)
            found.append(replace(row, onnx_bytes=420_000) if name == "int8" else row)
    return found


def test_the_table_has_means_and_the_smallest_file() -> None:
    lines = to_markdown(rows(), dict.fromkeys(("dense", *NAMES), "10 epochs")).splitlines()
    assert len(lines) == 2 + 1 + len(NAMES) and len({line.count("|") for line in lines}) == 1
    heads = [cell.strip() for cell in lines[0].split("|")]
    cells = {
        line.split("|")[1].strip(): dict(zip(heads, map(str.strip, line.split("|")), strict=True)) for line in lines
    }
    assert cells["dense"]["test accuracy, %"] == "94.10 ± 0.14" and cells["dense"]["times smaller"] == "1.1"
    assert cells["dense"]["ms, batch 64"] == "30.0 (29.0-33.0)"
    assert cells["int8"]["smallest file, kB"] == "420.0" and cells["int8"]["times smaller"] == "3.8"
    assert cells["XNOR"]["smallest file, kB"] == "111.0" and cells["XNOR"]["times smaller"] == "14.4"


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_every_point_has_a_name_that_can_be_read(num_seeds: int) -> None:
    chosen = [row for row in rows() if row.seed < num_seeds]
    figure = plot_techniques(chosen, lambda row: row.bytes / 1e3, "kilobytes")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [text for text in axes.texts if isinstance(text, Annotation)]
    boxes = {text.get_text(): Text.get_window_extent(text) for text in texts}
    assert boxes.keys() == {"dense", *NAMES}
    assert not [pair for pair in combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]
    for name, text in ((text.get_text(), text) for text in texts):
        row = next(row for row in chosen if row.technique == name)
        assert text.xy[0] == pytest.approx(row.bytes / 1e3), name
        x, y = axes.transData.transform(text.xy)
        box = boxes[name]
        away = np.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
        assert away < 60, f"{name} stands {away:.0f} pixels from its point"
        assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1), name
        assert axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1), name


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_csv(rows(), TechniqueRow, tmp_path / "techniques.csv")
    assert read_rows(tmp_path / "techniques.csv") == rows()
