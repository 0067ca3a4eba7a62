from dataclasses import replace

from project.compression.report_rows import ReportRow
from project.deployment.benchmark.rows import BenchmarkRow
from project.deployment.report_plots import plot_benchmark, plot_levels, plot_report


def test_levels_run_from_dense_to_sparse():
    axes = plot_levels([(1.0, 0.90), (0.5, 0.91), (0.1, 0.8)], "val/accuracy").axes[0]
    left, right = axes.get_xlim()
    assert left > right and list(axes.lines[0].get_xdata()) == [100.0, 50.0, 10.0]


def row(run: str, engine: str, accuracy: float | None, milliseconds: float, num_bytes: int) -> BenchmarkRow:
    times = {"latency_ms_batch64_p05": milliseconds / 2, "latency_ms_batch64_p95": milliseconds * 2}
    return BenchmarkRow(
        run, engine, test_accuracy=accuracy, latency_ms_batch64=milliseconds, file_bytes=num_bytes, **times
    )


def test_benchmark_has_a_marker_for_every_engine_and_a_colour_for_every_run():
    rows = [row(run, engine, 0.9, 3, 4_000_000) for run in ("a/0", "b/0") for engine in ("eager", "bf16")]
    by_time, by_bytes = plot_benchmark([*rows, row("b/0", "compiled", None, 1, 1)]).axes
    for axis, x in ((by_time, 3), (by_bytes, 4)):
        points = [line for line in axis.lines if line.get_marker() not in ("None", "|")]
        assert [(list(line.get_xdata()), list(line.get_ydata())) for line in points] == [([x], [90.0])] * 4
        assert len({line.get_marker() for line in points}) == len({line.get_color() for line in points}) == 2
        assert axis.get_xscale() == "log"
    (legend,) = by_time.figure.legends
    keys = {text.get_text(): line for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    assert list(keys) == ["a/0", "b/0", "eager", "bf16"]
    points = [line for line in by_time.lines if line.get_marker() not in ("None", "|")]
    named = {(row.run, row.engine): point for row, point in zip(rows, points, strict=True)}
    for (run, engine), point in named.items():
        assert keys[run].get_color() == point.get_color() and keys[engine].get_marker() == point.get_marker()
    assert plot_benchmark(rows[:1]).legends[0].get_texts()[0].get_text() == "eager"


def test_a_report_is_drawn_by_the_bytes_that_count() -> None:
    """Of a checkpoint, which also holds an optimizer, those of its weights; of a model file, the file's."""
    rows = [
        ReportRow("dense", test_accuracy=0.9, num_parameters=1000, file="level_0.ckpt", file_bytes=99_999),
        ReportRow("packed", test_accuracy=0.89, num_parameters=1000, file="model.packed", file_bytes=80),
        ReportRow("unknown", num_parameters=1000),
    ]
    (axes,) = plot_report(rows).axes
    drawn = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines}
    assert drawn == {"dense": (4.0, 90.0), "packed": (0.08, 89.0)}
    with_time = replace(rows[1], latency_ms_batch64=3.5)
    by_bytes, by_time = plot_report([rows[0], with_time]).axes
    assert [(*line.get_xdata(), *line.get_ydata()) for line in by_time.lines] == [(3.5, 89.0)]
    assert len(by_bytes.lines) == 2
