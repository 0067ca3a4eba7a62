"""The notebook runs from its first cell to its last, and shows its pictures."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_cell_runs_and_the_plots_are_pictures(logs, tmp_path):
    from PIL import Image

    cells = json.loads((ROOT / "playground.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    convert = ["nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path), "playground.ipynb"]
    done = subprocess.run(
        [sys.executable, "-m", *convert], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "playground.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    shown = ["".join(cell["source"]) for cell in code if any("image/png" in _data(out) for out in cell["outputs"])]
    assert [source.rstrip().splitlines()[-1].partition("(")[0] for source in shown] == ["plot_images", "plot_curves"]
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            if "image/png" in _data(output):
                pixels = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).convert("L")
                assert min(pixels.size) > 200 and pixels.getextrema()[0] < 100 < pixels.getextrema()[1]
    accuracy = json.loads((logs / "digits/version_0/summary.json").read_text())["test/accuracy"]
    assert accuracy > 0.3


def _data(output: dict) -> dict:
    return output.get("data", {})
