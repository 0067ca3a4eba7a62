import sys
from dataclasses import replace

import pytest
import torch

from project.metrics.benchmark import BenchmarkRow
from project.metrics.report import ReportRow
from project.plots import (
    figure_to_image,
    plot_benchmark,
    plot_confusion_matrix,
    plot_curves,
    plot_images,
    plot_levels,
    plot_report,
    read_curves,
)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_images", [1, 5, 16])
def test_every_image_is_drawn_with_its_title(channels, num_images):
    images = torch.linspace(0, 1, num_images * channels * 64).view(num_images, channels, 8, 8)
    titles = [f"image {index}" for index in range(num_images)]
    axes = plot_images(images, titles, columns=4).axes
    assert [axis.get_title() for axis in axes if axis.images] == titles
    drawn = torch.as_tensor(axes[0].images[0].get_array())
    wanted = (images[0] * 255).round().to(torch.uint8).movedim(0, -1)
    assert torch.equal(drawn, wanted[..., 0] if channels == 1 else wanted)


def test_bytes_and_floats_give_the_same_picture():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 4
    assert (figure_to_image(plot_images(images)) == figure_to_image(plot_images(images / 255))).all()


def test_picture_is_what_tensorboard_takes():
    image = figure_to_image(plot_images(torch.zeros(2, 1, 8, 8)))
    assert image.dtype == "uint8" and image.shape[2] == 3 and image.min() == 0 and image.max() == 255


def test_confusion_matrix_writes_the_counts_of_few_classes_and_names_of_many():
    matrix = torch.tensor([[8, 2], [0, 10]])
    axis = plot_confusion_matrix(matrix, ("cat", "dog")).axes[0]
    assert [text.get_text() for text in axis.texts] == ["8", "2", "10"]
    assert axis.get_title() == "18 of 20 right: 90.00%"
    assert torch.allclose(torch.as_tensor(axis.images[0].get_array()), torch.tensor([[0.8, 0.2], [0, 1]]).double())
    many = plot_confusion_matrix(torch.eye(100), [f"class {i}" for i in range(100)]).axes[0]
    assert not many.texts and len(many.get_xticklabels()) == 100
    assert plot_confusion_matrix(torch.zeros(3, 3), "abc").axes[0].get_title() == ""


def test_curves_of_a_metrics_file(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,train/loss,val/loss,test/loss\n0,9,,0.9,\n0,9,1.0,,\n1,19,,0.7,\n1,19,0.5,,\n2,20,,,0.6\n"
    )
    assert read_curves(path) == {"val/loss": ([0, 1], [0.9, 0.7]), "train/loss": ([0, 1], [1.0, 0.5])}
    (panel,) = plot_curves(path).axes
    assert panel.get_title() == "loss" and {line.get_label() for line in panel.lines} == {"train", "val"}


def test_curves_of_nothing_are_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step\n")
    with pytest.raises(ValueError, match=r"holds no curve such as train/loss"):
        plot_curves(path)


def test_no_global_state_of_pyplot_is_touched():
    plot_images(torch.zeros(1, 1, 8, 8))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


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
