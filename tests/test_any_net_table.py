"""The table of nets and techniques (scripts/any_net.py): how cells are judged, the page, the table of a few nets."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import any_net
import any_net_cells
import pytest
import torch
from any_net import NETS
from any_net_cells import CELLS, Cell
from any_net_page import Row, to_markdown
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
QUICK = "squeezenet1_1"
"""Nets that continuous integration takes through all cells. The command takes all nets."""


class Worker:
    """One cell, which does what it is told."""

    def __init__(self, action):
        self.action = action
        self.model = SimpleNamespace(net=nn.Sequential(nn.Conv2d(3, 4, 3)))

    def onnx(self):
        return self.action()


def judged(action) -> Cell:
    return any_net_cells.run_cell(Worker(action), "onnx")


def refuse(text: str):
    def action() -> str:
        raise ValueError(text)

    return action


def test_numbers_are_works():
    assert judged(lambda: "1e-06").status == "works"


def test_a_sentence_with_layer_and_remedy_is_refused():
    cell = judged(refuse("units of 0 can not be removed: it is the only layer. Add this layer to exclude."))
    assert (cell.status, cell.text[:10]) == ("refused", "units of 0")


@pytest.mark.parametrize(
    "text, fault",
    [
        ("units of 0 can not be removed", "refused without a remedy: units of 0"),
        ("some layer can not be removed: exclude it", "refused without the name of a layer: some"),
    ],
)
def test_a_sentence_that_lacks_something_has_failed(text, fault):
    cell = judged(refuse(text))
    assert cell.status == "failed" and cell.text.startswith(fault)


def test_a_refusal_after_training_has_failed():
    def action() -> str:
        any_net_cells.Steps().on_train_batch_end()
        return refuse("0 can not be pruned: exclude it")()

    cell = judged(action)
    assert cell.status == "failed" and cell.text.startswith("refused after 1 steps: 0 can")


def test_a_wrong_answer_and_a_traceback_have_failed(capsys):
    assert judged(lambda: any_net_cells.must(False, "its logits differ")).text == "its logits differ"
    cell = judged(lambda: {}["no key"])
    assert (cell.status, cell.text) == ("failed", "KeyError: 'no key'")
    assert "Traceback" in capsys.readouterr().err


def test_too_much_memory_has_failed(monkeypatch):
    monkeypatch.setattr(any_net_cells, "MAX_MEMORY_MB", 1)
    cell = judged(lambda: "1e-06")
    assert cell.status == "failed" and "the process needs" in cell.text


def test_equal_looks_at_every_tensor():
    one = {"a": [torch.zeros(2), {"b": 1}]}
    assert any_net_cells.equal(one, {"a": [torch.zeros(2), {"b": 1}]})
    assert not any_net_cells.equal(one, {"a": [torch.tensor([0.0, 1e-7]), {"b": 1}]})
    assert not any_net_cells.equal(one, {"a": [torch.zeros(2), {"b": 1}], "c": 1})


def test_the_page_has_all_cells_and_footnotes():
    cells = [
        Cell("fit", "works", "90.0 %", 2.0, 700),
        Cell("winograd", "refused", "Net has no 3x3\nlayer: leave it out"),
    ]
    rows = [Row("resnet18", cells, 10, (3, 32, 32), 500, 550), Row("vit", [Cell("fit", "works", "80 %")])]
    text = to_markdown(rows, ["fit", "winograd"], "python scripts/any_net.py")
    assert "| resnet18 | 90.0 % | refused (1) |" in text and "| vit | 80 % | **failed** (2) |" in text
    assert "1. resnet18, Winograd: Net has no 3x3 layer: leave it out\n2. vit, Winograd: it was not run" in text
    assert "Of 4 cells 2 work and 1 are refused" in text and "| resnet18 | 10 | 3x32x32 | 2 | 2 | 700 | +50 |" in text


def test_failures_are_cells_and_memory_that_is_kept():
    row = Row("vit", [Cell("fit", "works", "80 %"), Cell("pt2", "failed", "no")], before_mb=500, after_mb=750)
    assert list(row.failures) == ["vit, pt2: no", "vit: the process keeps 250 MB"]


def test_a_process_that_dies_is_a_failure(monkeypatch):
    done = subprocess.CompletedProcess([], -9, 'any_net: {"begin": "fit"}\n', "Killed")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    assert list(any_net.row_of("vit", ["fit"], []).failures) == ["vit, fit: it ended: exit status -9, Killed"]


def test_the_page_is_of_the_script():
    """The rows are nets of the script, all techniques are there, and no cell has failed."""
    page = ROOT / "docs/any_net.md"
    if not page.is_file():
        pytest.skip("this fork has left out a technique, and the page with it")
    text = page.read_text()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == ["net", *CELLS.values()]
    rows = [row for row in table if len(row) == len(table[0]) and row[0] in NETS]
    assert [row[0] for row in rows] == list(NETS) and "failed**" not in text
    assert f"Of {len(rows) * len(CELLS)} cells" in text


@pytest.mark.slow
def test_the_table(tmp_path):
    options = ["--nets", QUICK, "--epochs=1", "--batches=3", "--output", str(tmp_path / "page.md")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, str(ROOT / "scripts/any_net.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"| {QUICK} | " in (tmp_path / "page.md").read_text()
