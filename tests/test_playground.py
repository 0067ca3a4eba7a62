"""The notebook runs from its first cell to its last."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_cell_runs(logs, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "playground.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    names: dict[str, object] = {}
    for cell in code:
        exec(compile(cell, "playground.ipynb", "exec"), names)
    assert names["trainer"].callback_metrics["test/accuracy"] > 0.3  # type: ignore[attr-defined]
