"""The charts of the documents: drawn from the committed numbers, with names that can be read at their points."""

import csv
import re
import shutil
from itertools import combinations
from pathlib import Path

import draw_charts
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def figure() -> Figure:
    """The chart of accuracy against bytes, as it is committed."""
    figure = draw_charts.plot_results(draw_charts.read_results(DOCS / "pictures/accuracy_against_bytes.csv"))
    figure.draw_without_rendering()
    return figure


def test_every_name_can_be_read(figure: Figure) -> None:
    (axes,) = figure.axes
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in axes.texts]
    assert len(boxes) == 12 and {"dense", "4-bit weights", "units pruned and int8"} <= dict(boxes).keys()
    assert not [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    for name, box in boxes:
        assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1), name
        assert axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1), name
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.x1, "the legend does not fit"


def test_every_number_of_the_chart_is_in_the_document_that_it_names() -> None:
    with (DOCS / "pictures/accuracy_against_bytes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        name, *_ = re.split("[,:]", row["source"])
        path = DOCS.parent / name
        if not path.is_file():  # a fork took out the technique and its page
            continue
        text = path.read_text()
        number = row["accuracy_percent"]
        assert number in text, f"{row['label']}: {name} does not say {number}"


@pytest.mark.slow
def test_the_script_draws_the_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    name = "pictures/accuracy_against_bytes"
    shutil.copy(DOCS / f"{name}.csv", tmp_path / f"{name}.csv")
    monkeypatch.setattr("sys.argv", ["draw_charts.py", "--docs", str(tmp_path)])
    draw_charts.main()
    with Image.open(tmp_path / f"{name}.png") as drawn, Image.open(DOCS / f"{name}.png") as committed:
        assert drawn.size == committed.size


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small(path: Path) -> None:
    assert path.stat().st_size < 150_000
    with Image.open(path) as image:
        assert image.width <= 1200
