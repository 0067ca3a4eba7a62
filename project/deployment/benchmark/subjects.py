"""What a benchmark measures: the nets of runs, each with its weights and its model files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from project.data import ImageDataModule
from project.frame.paths import Run
from project.frame.trust import UntrustedError
from project.learning.checkpoints import with_weights
from project.learning.classifier import Classifier


@dataclass(frozen=True)
class Subject:
    """A trained net to measure.

    Args:
        name: name of the run.
        module: classifier with the weights of the run, on the CPU.
        files: paths of the model files in the run's folder.
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
    """A run's net with its weights, and the nets of the runs to compare it with.

    Args:
        run: first run, which the others are compared with.
        checkpoint: path of the checkpoint with the first run's weights.
        module: classifier built from the first run's configuration; it does not change. ``None`` builds the one that
            the checkpoint describes.
        compare: folders of the other runs, whose best checkpoints are taken; a run that is given twice counts once.
        files: whether to measure the first run's model files too.

    Raises:
        ValueError: if a folder holds no run or no checkpoint, the weights do not fit the net, or a checkpoint does not
            describe how to build its net.
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
    """Refuse a subject that has other classes or another image shape than the data.

    Raises:
        ValueError: if they differ.
    """

    def words(classes: Sequence[str], shape: Sequence[int]) -> str:
        return f"{len(classes)} classes ({', '.join(classes[:3])}, …) and images of {'x'.join(map(str, shape))}"

    module = subject.module
    own, wanted = (module.class_names, module.image_shape), (tuple(data.class_names), tuple(data.image_shape))
    if own != wanted:
        raise ValueError(
            f"{subject.name} has {words(*own)}, but the test data of this benchmark have {words(*wanted)}: compare "
            "runs on the same data set."
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message, cut to 200 characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "without a message")
    return line if len(line) <= 200 else f"{line[:199]}…"


def _from(checkpoint: str | os.PathLike[str]) -> Classifier:
    try:
        return Classifier.load_from_checkpoint(Path(checkpoint), map_location="cpu", weights_only=True).eval()
    except UntrustedError:
        raise
    except Exception as error:
        raise ValueError(
            f"the checkpoint is {str(checkpoint)!r}, but its net cannot be built from it ({first_line(error)}): give a "
            "run that `project fit` made."
        ) from error


def _names(folders: Sequence[Path]) -> list[str]:
    """``<experiment>/<version>`` of each folder, with as many more folders in front as make all names different."""
    depth = 2
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]
