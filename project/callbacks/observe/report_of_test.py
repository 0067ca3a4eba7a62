"""Report of a test: the confusion matrix, the most confident mistakes and the accuracy of each class."""

import csv
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from project.callbacks.observe.look_at_batch import denormalize
from project.callbacks.places import run_of, show_figure, tensorboard
from project.frame.paths import write_whole
from project.learning.whole_batch import gather

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class TestReport(Callback):
    """Writes ``confusion_matrix.png``, ``mistakes.png`` and ``per_class_accuracy.csv`` to the run's folder.

    The pictures also go to TensorBoard. While the test runs, only ``num_mistakes`` images are kept in memory. With
    several processes the report covers the images of all of them.

    Example::

        trainer:
          callbacks+:
            - class_path: project.callbacks.TestReport
              init_args: {num_mistakes: 48}

    Args:
        num_mistakes: number of wrongly classified images to draw, 0 or more.

    Raises:
        ValueError: if ``num_mistakes`` is negative.
    """

    __test__ = False  # the name begins with Test, but this is no test for pytest

    def __init__(self, num_mistakes: int = 24) -> None:
        if num_mistakes < 0:
            raise ValueError(f"num_mistakes is {num_mistakes}, but it counts the images to draw: choose 0 or more.")
        self.num_mistakes = num_mistakes
        self.matrix: Tensor | None = None
        """Counts ``[K, K]``: the row is the true class, the column the predicted class."""
        self.mistakes: Mistakes | None = None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.matrix, self.mistakes = None, Mistakes(self.num_mistakes)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self.mistakes is not None
        logits, labels = outputs["logits"].detach().float(), outputs["labels"]
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        counts = count_confusions(labels, predictions, logits.shape[1])
        self.matrix = counts if self.matrix is None else self.matrix + counts
        self.mistakes.update(batch[0], labels, predictions, confidences)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.matrix is None or self.mistakes is None:
            return
        if trainer.world_size > 1:
            self.matrix = trainer.strategy.reduce(self.matrix, reduce_op="sum")
            self.mistakes.gather_()
        run = run_of(trainer)
        if run is None and tensorboard(trainer) is None:
            return
        for name, figure in self._figures(pl_module).items():
            show_figure(trainer, f"test/{name}", figure)
        if run is not None:
            path, matrix = run.folder / "per_class_accuracy.csv", self.matrix
            write_whole(path, lambda part: write_per_class(part, matrix, pl_module.class_names))
            log.info("Confusion matrix, mistakes and accuracy per class are in %s", run.folder)

    def _figures(self, module: Any) -> "dict[str, Figure]":
        from project.callbacks.observe.confusion_plot import plot_confusion_matrix
        from project.callbacks.observe.plots import plot_images

        assert self.matrix is not None and self.mistakes is not None
        names = module.class_names
        figures = {"confusion_matrix": plot_confusion_matrix(self.matrix, names)}
        if rows := self.mistakes.rows():
            titles = [f"{names[predicted]} {confidence:.1%}\nis {names[true]}" for true, predicted, confidence in rows]
            images = denormalize(self.mistakes.images[: len(rows)], module)
            figures["mistakes"] = plot_images(images, titles, columns=6, heading="most confident mistakes")
        return figures


class Mistakes:
    """Keeps the ``size`` wrongly classified images with the highest confidence, without waiting for the device.

    Args:
        size: number of images to keep, 0 or more.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.images = torch.empty(0)
        """Images ``[size, C, H, W]``, the most confident mistake first. With fewer mistakes than ``size``, correctly
        classified images follow; :meth:`rows` leaves them out."""
        self._labels = torch.empty(0)
        self._predictions = torch.empty(0)
        self._confidences = torch.empty(0)

    def update(self, images: Tensor, labels: Tensor, predictions: Tensor, confidences: Tensor) -> None:
        """Add the mistakes of a batch: images ``[N, C, H, W]``, all other tensors ``[N]``."""
        confidences = torch.where(predictions == labels, -1.0, confidences)
        new = (images, labels, predictions, confidences)
        best = confidences.topk(min(self.size, len(confidences))).indices
        self._keep(*(tensor.detach()[best] for tensor in new))

    def rows(self) -> list[tuple[int, int, float]]:
        """The true class, the predicted class and the confidence of each mistake, the most confident first."""
        columns = (self._labels.tolist(), self._predictions.tolist(), self._confidences.tolist())
        return [row for row in zip(*columns, strict=True) if row[2] >= 0]

    def gather_(self) -> None:
        """Merge the mistakes of all processes.

        Processes may hold different numbers of mistakes, so each pads its tensors to ``size`` before they are gathered.
        """
        kept = [self.images, self._labels, self._predictions, self._confidences]
        missing = self.size - len(self._confidences)
        padded = [torch.cat([t, t.new_full((missing, *t.shape[1:]), -1)]) for t in kept]
        gathered = [gather(tensor) for tensor in padded]
        self.__init__(self.size)  # type: ignore[misc]
        self._keep(*gathered)

    def _keep(self, *new: Tensor) -> None:
        kept = (self.images, self._labels, self._predictions, self._confidences)
        merged = [torch.cat([old, more]) if len(old) else more for old, more in zip(kept, new, strict=True)]
        order = merged[-1].topk(min(self.size, len(merged[-1]))).indices
        self.images, self._labels, self._predictions, self._confidences = (tensor[order] for tensor in merged)


def count_confusions(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix: counts ``[K, K]`` of (true class, predicted class)."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def write_per_class(path: Path, matrix: Tensor, class_names: tuple[str, ...]) -> None:
    """Write a CSV file with one row for each class.

    Its columns are the class, the number of test images, the number classified correctly, the accuracy, and the class
    with which it is most often confused.
    """
    counts = matrix.cpu()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "num_images", "num_correct", "accuracy", "most_confused_with"])
        for index, name in enumerate(class_names):
            row = counts[index].clone()
            total, correct = int(row.sum()), int(row[index])
            row[index] = 0
            other = class_names[int(row.argmax())] if row.sum() else ""
            writer.writerow([name, total, correct, round(correct / total, 6) if total else "", other])
