"""Speedups and tables of benchmark rows, from numbers that are known."""

from dataclasses import replace

import pytest

from project.deployment.benchmark.rows import BenchmarkRow, slow_files, to_markdown, to_short_table, with_speedups
from project.deployment.latency import Latency


def row(run: str, engine: str, batch1: float, batch64: float, file: str | None = None) -> BenchmarkRow:
    latencies = [Latency(median, 0.9 * median, 1.5 * median, 20, 2) for median in (batch1, batch64)]
    counts = {"test_accuracy": 0.9376, "num_parameters": 400186, "file_bytes": 1604449}
    return BenchmarkRow(run, engine, file, **counts).with_latencies(*latencies)


ROWS = [
    row("a", "eager", 2.0, 30),
    row("b", "eager", 1.0, 10),
    row("a", "onnxruntime", 0.5, 40),
    row("a", "bf16", 4.0, 15),
    row("a", "onnxruntime", 0.25, 20, "model_int8.onnx"),
    BenchmarkRow("a", "compiled", remark="not measured, RuntimeError: no compiler"),
]


def test_speedups_are_over_the_best_fp32_engine_of_the_first_run_at_each_batch_size():
    """Neither bf16, nor a model file, nor another run is that engine."""
    rows = with_speedups(ROWS)
    assert [one.speedup_batch1 for one in rows] == [0.25, 0.5, 1, 0.125, 2, None]
    assert [one.speedup_batch64 for one in rows] == [1, 3, 0.75, 2, 1.5, None]
    assert [one.images_per_second for one in rows[:2]] == pytest.approx([64 / 0.03, 6400])
    assert with_speedups([ROWS[3]])[0].speedup_batch1 is None


def test_markdown_says_what_on_what_and_why_not():
    text = to_markdown(with_speedups(ROWS), "Benchmark of a, b", {"machine": "AMD, 2 threads"}, ["Not here: cuda."])
    lines = text.splitlines()
    assert lines[:3] == ["# Benchmark of a, b", "", "- machine: AMD, 2 threads"]
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(ROWS) and len({line.count("|") for line in table}) == 1
    expected = "| a | model_int8.onnx, onnxruntime | 0.9376 | 400,186 |  |  | 1,604,449 | 0.250 (0.225-0.375) |"
    assert table[6].startswith(expected) and table[6].endswith("| 3,200 | 2.00x | 1.50x |  |")
    assert "a, compiled: not measured, RuntimeError: no compiler." in lines and "Not here: cuda." in lines


def test_short_table_names_runs_only_when_there_are_several():
    heads, cells = to_short_table(ROWS)
    assert heads[:2] == ["run", "engine"] and {len(line) for line in cells} == {len(heads)}
    assert cells[0][:5] == ["a", "eager", "93.76 %", "1,604,449", "2.00 (3.00)"]
    assert to_short_table(ROWS[2:])[0][0] == "engine"


def test_a_smaller_file_that_is_no_faster_says_so():
    """Compared with the same engine: a file that beats fp32 in a slow engine alone gains nothing."""
    small = replace(row("a", "onnxruntime", 0.5, 39.0, "model_int8.onnx"), file_bytes=400_000)
    (sentence,) = slow_files([*ROWS, small])
    assert sentence.startswith("a, model_int8.onnx, onnxruntime: no faster than fp32") and "1.03 times" in sentence
    assert not slow_files([*ROWS, replace(small, latency_ms_batch64=20.0)])
    assert not slow_files([*ROWS, replace(small, file_bytes=1_600_000)])
