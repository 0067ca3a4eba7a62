"""The script that compares the criteria of units: a run, and the page."""

import argparse

import compare_unit_criteria as script
import pytest
import torch

ARGS = argparse.Namespace(
    images=128, width=0.25, epochs=1, finetune=1, gradient_images=8, strength=1e-3, seeds=[0], shares=[0.5]
)


class Noise:
    """Random images in the place of Fashion-MNIST."""

    def __init__(self, num_images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.train, self.test = (
            (torch.randn(count, *script.SHAPE, generator=generator), torch.arange(count) % 10)
            for count in (num_images, 500)
        )


def test_a_row_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "Data", Noise)
    monkeypatch.setenv("PROJECT_LOGS_DIR", str(tmp_path))
    args = argparse.Namespace(**vars(ARGS), criteria=["magnitude, own weights", "norm_scale, slimmed"])
    path = tmp_path / "rows.csv"
    script.measure(args, path)
    rows = script.read_rows(path)
    assert [row.criterion for row in rows] == args.criteria
    assert all(0.3 < row.macs <= 0.5 and row.share == 0.5 for row in rows)
    assert len(list(tmp_path.glob("unit_criteria/*.pt"))) == 2
    monkeypatch.setattr(script, "train_", lambda *_: pytest.fail("it trains again"))
    script.measure(args, path)
    assert script.read_rows(path) == rows


def made_up() -> list[script.Row]:
    """Three seeds: taylor gains 1 point for each over magnitude, obd 0.9, 1.1 and 1.3."""
    rows = []
    for seed, after in enumerate((0.88, 0.90, 0.89)):
        for criterion, gain in (("magnitude", 0.0), ("taylor", 0.01), ("obd", 0.009 + 0.002 * seed)):
            rows.append(script.Row("setting", criterion, seed, 0.6, 0.4, 0.91, 0.2, after + gain))
    return rows


def test_the_page_orders_the_criteria_and_names_those_that_are_as_good():
    page = script.to_markdown(made_up(), ARGS, "python scripts/compare_unit_criteria.py")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["obd", "taylor", "magnitude"]
    assert "| 40 % | 20.00 ± 0.00 | 90.10 ± 1.11 | +1.10 ± 0.20 | 3 |" in lines[0]
    assert "`obd` is the most accurate. Less than two standard errors of the difference behind it: `taylor`." in page
    assert "| dense net |  | 100 % |  | 91.00 ± 0.00 |  | 3 |" in page
    assert max(len(line) for line in page.splitlines() if "|" not in line) <= 120
