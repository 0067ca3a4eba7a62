import csv

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project.callbacks import TestReport
from project.callbacks.observe.report_of_test import Mistakes


def predict(model, data):
    images, labels = data.images[160:260], data.labels[160:260]
    with torch.no_grad():
        confidences, predictions = model.eval()(images).softmax(dim=1).max(dim=1)
    return images, labels, predictions, confidences


def test_finds_the_most_confident_mistakes_over_several_batches(tiny):
    report, model, data = TestReport(num_mistakes=7), tiny.classifier(), tiny.data()
    tiny.trainer([report], with_run=False).test(model, data, verbose=False)
    images, labels, predictions, confidences = predict(model, data)
    wrong = (predictions != labels).nonzero().squeeze(1)
    assert len(wrong) > 40
    order = wrong[confidences[wrong].argsort(descending=True)][:7]
    found = report.mistakes.rows()
    assert [row[:2] for row in found] == list(zip(labels[order].tolist(), predictions[order].tolist(), strict=True))
    assert [row[2] for row in found] == pytest.approx(confidences[order].tolist())
    assert torch.equal(report.mistakes.images, images[order])
    matrix = torch.zeros(10, 10, dtype=torch.long)
    matrix.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    assert torch.equal(report.matrix, matrix)


@pytest.mark.parametrize("size", [0, 3, 20])
@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_right_ones_are_no_mistakes(size, batch_size):
    torch.manual_seed(0)
    images, labels = torch.randn(10, 1, 2, 2), torch.arange(10)
    predictions, confidences = labels.clone(), torch.rand(10)
    predictions[3:5] = 0
    mistakes = Mistakes(size)
    for start in range(0, 10, batch_size):
        mistakes.update(*(each[start : start + batch_size] for each in (images, labels, predictions, confidences)))
    assert len(mistakes.rows()) == min(size, 2)
    assert {row[0] for row in mistakes.rows()} <= {3, 4}
    assert len(mistakes.images) <= size


def test_writes_pictures_and_the_accuracy_of_every_class(tiny):
    trainer = tiny.trainer([TestReport()], tensorboard=True)
    data = tiny.data()
    trainer.test(tiny.classifier(), data, verbose=False)
    folder = tiny.run.folder
    assert (folder / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "mistakes.png").stat().st_size > 1000
    rows = list(csv.DictReader((folder / "per_class_accuracy.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == [f"digit {label}" for label in range(10)]
    assert sum(int(row["num_images"]) for row in rows) == 100
    correct = sum(int(row["num_correct"]) for row in rows)
    assert correct / 100 == pytest.approx(trainer.callback_metrics["test/accuracy"].item())
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    trainer.logger.experiment.flush()
    events = EventAccumulator(str(folder)).Reload()
    assert {"test/confusion_matrix", "test/mistakes"} <= set(events.Tags()["images"])


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="num_mistakes is -1"):
        TestReport(-1)
