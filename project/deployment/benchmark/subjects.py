"""Who is measured by :mod:`project.deployment.benchmark.measure`: the nets of runs, each with its weights and its
model files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from project.data import ImageDataModule
from project.frame.paths import Run
from project.learning.checkpoints import with_weights
from project.learning.classifier import Classifier


@dataclass(frozen=True)
class Subject:
    """A trained net to measure.

    Args:
        name: of its run.
        module: the classifier with its weights, on the processor.
        files: its exported models.
    """

    name: str
    module: Classifier
    files: Sequence[Path] = ()


def load_subjects(
    run: Run,
    checkpoint: str | os.PathLike[str],
    module: Classifier | None = None,
    *,
    compare: Sequence[str] = (),
    files: bool = True,
) -> list[Subject]:
    """A run's net with its weights, and those of the runs to put beside it.

    Args:
        run: the first.
        checkpoint: its weights.
        module: a classifier of its configuration, left as it was; ``None`` builds the one the checkpoint describes.
        compare: folders of the other runs, for each one's best checkpoint; the same run twice counts once.
        files: measure the first run's model files too.

    Raises:
        ValueError: when a folder holds no run or no checkpoint, net and weights do not fit, or a checkpoint does not
            say how to build its net.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    folders, first = [run.folder.resolve()], with_weights(module, content) if module else _from(checkpoint)
    modules, model_files = [first], [run.model_files if files else []]
    for other in (Run.find(folder, "compare") for folder in compare):
        if other.folder.resolve() not in folders:
            folders.append(other.folder.resolve())
            modules.append(_from(other.weights("compare")))
            model_files.append(other.model_files)
    return [Subject(*parts) for parts in zip(_names(folders), modules, model_files, strict=True)]


def check_data(subject: Subject, data: ImageDataModule) -> None:
    """Its classes and image shape are those of the data.

    Raises:
        ValueError: otherwise.
    """

    def words(classes: Sequence[str], shape: Sequence[int]) -> str:
        return f"{len(classes)} classes ({', '.join(classes[:3])}, …) and images of {'x'.join(map(str, shape))}"

    module = subject.module
    own, wanted = (module.class_names, module.image_shape), (tuple(data.class_names), tuple(data.image_shape))
    if own != wanted:
        raise ValueError(
            f"{subject.name} has {words(*own)}, but the test images of this benchmark are of {words(*wanted)}: "
            "compare runs on the same data set."
        )


def first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "without a word")
    return line if len(line) <= 200 else f"{line[:199]}…"


def _from(checkpoint: str | os.PathLike[str]) -> Classifier:
    try:
        return Classifier.load_from_checkpoint(Path(checkpoint), map_location="cpu", weights_only=True).eval()
    except Exception as error:
        raise ValueError(
            f"the checkpoint is {str(checkpoint)!r}, but its net cannot be built from it ({first_line(error)}): "
            "compare runs that `project fit` made."
        ) from error


def _names(folders: Sequence[Path]) -> list[str]:
    """``<experiment>/<version>``, with as many more folders in front as tell all apart."""
    depth = 2
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]
