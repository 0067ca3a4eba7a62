"""Folders of class folders: every layout, gray and colour, in memory and on the fly, and every fault named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from project.data import ArrayDataset, ImageFiles, ImageFolder

CLASSES = ("cat", "dog", "emu")


def write_classes(folder: Path, num: int = 10, classes: tuple[str, ...] = CLASSES) -> None:
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(num):
            pixels = generator.integers(0, 256, (12 + k, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert("L" if k % 2 else "RGB").save(folder / name / f"{k}.png")


def folder(root: Path, **kwargs: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"image_size": 8, "batch_size": 4, "val_fraction": 0.2, **kwargs})


def sizes(data: ImageFolder) -> list[int]:
    data.setup()
    return [len(part) for part in (data.train_data, data.val_data, data.test_data) if part is not None]


@pytest.mark.parametrize("in_memory", [True, False])
def test_layouts(tmp_path: Path, in_memory: bool) -> None:
    write_classes(tmp_path / "flat")
    assert sizes(folder(tmp_path / "flat", in_memory=in_memory)) == [19, 5, 6]
    write_classes(tmp_path / "parts" / "train")
    assert sizes(folder(tmp_path / "parts", in_memory=in_memory)) == [19, 5, 6]
    write_classes(tmp_path / "parts" / "val", 2)
    assert sizes(folder(tmp_path / "parts", in_memory=in_memory)) == [24, 6, 6]
    write_classes(tmp_path / "parts" / "test", 3)
    assert sizes(folder(tmp_path / "parts", in_memory=in_memory)) == [30, 6, 9]


@pytest.mark.parametrize("channels", [1, 3])
def test_in_memory_and_on_the_fly_give_the_same_batches(tmp_path: Path, channels: Any) -> None:
    write_classes(tmp_path)
    batches = []
    for kwargs in ({}, {"memory_limit_mb": 0.0}, {"memory_limit_mb": 0.0, "num_workers": 1}):
        data = folder(tmp_path, channels=channels, **kwargs)
        assert data.class_names == CLASSES and data.num_classes == 3
        assert data.image_shape == (channels, 8, 8) and len(data.mean) == len(data.std) == channels
        data.setup()
        assert isinstance(data.train_data, ArrayDataset if not kwargs else ImageFiles)
        batches.append(list(data.train_dataloader()))
    for other in batches[1:]:
        assert len(other) == len(batches[0]) == 4
        for ours, theirs in zip(batches[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    images, labels, indices = batches[0][0]
    assert images.shape == (4, channels, 8, 8) and images.dtype == torch.uint8
    assert labels.dtype == indices.dtype == torch.int64


def test_random_crop_acts_on_training_images_alone(tmp_path: Path) -> None:
    write_classes(tmp_path)
    data = folder(tmp_path, random_crop=(0.1, 0.5), seed=1)
    plain = folder(tmp_path, in_memory=False)
    for each in (data, plain):
        each.setup()
    assert data.train_data is not None and plain.train_data is not None
    assert isinstance(data.train_data, ImageFiles)
    first = next(iter(data.train_dataloader()))[0]
    assert torch.equal(next(iter(data.train_dataloader()))[0], first)
    assert not torch.equal(data.train_data.__getitems__([0])[0], plain.train_data.__getitems__([0])[0])
    for ours, theirs in ((data.val_data, plain.val_data), (data.test_data, plain.test_data)):
        assert ours is not None and theirs is not None
        assert torch.equal(ours.__getitems__([0, 1])[0], theirs.__getitems__([0, 1])[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_corrupt_files_are_refused_or_skipped(
    tmp_path: Path, in_memory: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", 2)
    bad = tmp_path / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"dog/3.png is truncated or no image"):
        data = folder(tmp_path, in_memory=in_memory, val_fraction=0.0)
        data.setup("fit")
        list(data.train_dataloader())
    data = folder(tmp_path, in_memory=in_memory, on_corrupt="skip", val_fraction=0.0, batch_size=1)
    data.setup("fit")
    assert sum(len(images) for images, _, _ in data.train_dataloader()) == 29
    assert str(bad) in caplog.text


def test_a_workers_error_names_the_file_in_one_line(tmp_path: Path) -> None:
    write_classes(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.write_text("no image")
    data = folder(tmp_path, in_memory=False, num_workers=1)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"\.png is truncated or no image") as error:
        list(data.train_dataloader())
    assert "\n" not in str(error.value)


def test_faults_of_the_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no class folders"):
        folder(tmp_path)
    write_classes(tmp_path / "train")
    (tmp_path / "train" / "fox").mkdir()
    data = folder(tmp_path)
    assert data.num_classes == 4
    with pytest.raises(ValueError, match="fox holds no images"):
        data.setup("fit")
    (tmp_path / "train" / "fox").rmdir()
    write_classes(tmp_path / "test", 2, ("cat", "yak"))
    with pytest.raises(ValueError, match=r"yak is a class that .*train does not have"):
        folder(tmp_path).setup("test")


def test_relative_root_is_looked_for_in_the_data_folder(tmp_path: Path) -> None:
    write_classes(tmp_path / "animals")
    assert folder(Path("animals"), data_dir=str(tmp_path)).class_names == CLASSES


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 2}, "channels is 2"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"random_crop": (0.0, 1.0)}, "random_crop is"),
        ({"random_crop": (0.1, 1.0), "in_memory": True}, "in_memory is true"),
        ({"mean": (0.5,)}, "mean is"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, kwargs: dict[str, Any], words: str) -> None:
    write_classes(tmp_path, 1)
    with pytest.raises(ValueError, match=words):
        folder(tmp_path, **kwargs)
