"""metrics.csv: rows, new columns, and going on in an old file."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from project.frame.logger import MetricsCSV


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_with_new_columns_keep_the_old_ones(tmp_path):
    path = tmp_path / "e" / "version_0" / "metrics.csv"
    logger = MetricsCSV(path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.log_metrics({"loss": 0.5}, step=1)
    logger.log_metrics({"accuracy": 0.9}, step=1)
    assert rows(path) == [
        {"step": "0", "loss": "1.0", "accuracy": ""},
        {"step": "1", "loss": "0.5", "accuracy": ""},
        {"step": "1", "loss": "", "accuracy": "0.9"},
    ]
    assert (logger.name, logger.version) == ("e", "version_0")


def test_a_second_logger_goes_on_and_can_forget(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step=step)
    second = MetricsCSV(path)
    second.forget_after(2)
    second.log_metrics({"loss": 9.0}, step=3)
    assert [row["loss"] for row in rows(path)] == ["0.0", "1.0", "2.0", "9.0"]


@pytest.mark.slow
def test_lines_that_nobody_reads_are_dropped():
    """As after ``project fit … | head -1``."""
    code = (
        "import logging, os, sys; from project.frame.logger import setup_logging; setup_logging();"
        "reader, writer = os.pipe(); os.dup2(writer, 1); os.close(writer); os.close(reader);"
        "sys.stdout.reconfigure(line_buffering=True); log = logging.getLogger('project.x');"
        "log.info('one'); log.info('two'); print('three'); sys.stderr.write('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "end")
