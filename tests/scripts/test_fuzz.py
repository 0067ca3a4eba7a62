"""Two hundred damaged files of each format: refused in one sentence, or the same after writing and reading."""

import time
import warnings
from pathlib import Path

import pytest
from fuzz import MAX_SECONDS, main, read_one
from fuzz_formats import FORMATS

QUICK = ("idx", "cifar", "image")


@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FORMATS]
)
def test_two_hundred_damaged_files(format: str, tmp_path: Path) -> None:
    files = FORMATS[format](tmp_path)
    verdicts = []
    for number in range(200):
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's
            verdicts.append(read_one(files, 0, number))
        assert time.process_time() - start < MAX_SECONDS, number
    wrong = {number: verdict for number, verdict in enumerate(verdicts) if verdict not in ("refused", "same")}
    assert not wrong
    assert verdicts.count("refused") > 60


@pytest.mark.slow
def test_the_script_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["idx", "--inputs", "20", "--seed", "3"]) == 0
    assert "idx: 20 files" in capsys.readouterr().out
