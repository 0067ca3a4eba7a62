"""Which files count as images and which folders as parts and classes; all that is left out is refused or told."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from project.data import ImageFolder, find_images

JUNK = (
    "a/._0.png",
    "a/.ipynb_checkpoints/0-checkpoint.png",
    "a/Thumbs.db",
    "b/.DS_Store",
    "b/desktop.ini",
    "b/@eaDir/0.png/SYNOFILE_THUMB.jpg",
    "b/__MACOSX/b/._0.png",
    "__MACOSX/a/._0.png",
    ".git/x.png",
    "@eaDir/0.png",
    "._a.png",
)
"""Files that macOS, Jupyter, Windows, a file server and git put among images."""


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name, format="PNG")
    return root


def classes(root: Path, *folders: str, num: int = 4) -> Path:
    return write(root, *(f"{folder}/{k}.png" for folder in folders for k in range(num)))


def folder(root: Path) -> ImageFolder:
    return ImageFolder(str(root), image_size=8, batch_size=1, val_fraction=0.25, test_fraction=0.25)


def counts(root: Path) -> list[int]:
    data = folder(root)
    data.setup()
    assert data.train_data is not None and data.val_data is not None and data.test_data is not None
    return [len(data.train_data), len(data.val_data), len(data.test_data)]


def test_what_systems_make_is_no_image_and_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = classes(tmp_path, "a", "b")
    for name in JUNK:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    assert folder(root).class_names == ("a", "b")
    assert counts(root) == [4, 2, 2]
    assert len(find_images(root)) == 8
    assert caplog.text == ""


def test_a_hidden_folder_above_hides_nothing(tmp_path: Path) -> None:
    assert counts(classes(tmp_path / ".cache" / "photos", "a", "b")) == [4, 2, 2]


@pytest.mark.parametrize("suffix", ["avif", "jfif", "JPE", "jp2", "tga", "qoi", "pnm", "dib"])
def test_what_pillow_reads_is_found(suffix: str, tmp_path: Path) -> None:
    kind = {"jfif": "JPEG", "JPE": "JPEG", "pnm": "PPM"}.get(suffix)
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (8, 8)).save(path, format=kind)
    assert find_images(tmp_path) == [path]


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = classes(tmp_path, "train/a", "train/b", "test/a", "test/b")
    for name in ("train/a/clip.mp4", "train/b/clip.mp4", "train/b/notes.txt", "labels.csv"):
        (root / name).touch()
    write(root, "train/stray.png", "above.png", "extra/1.png")
    data = folder(root)
    data.setup()
    told = [record.message for record in caplog.records]
    assert len(told) == 1
    assert "6 files or folders are left out" in told[0]
    assert all(kind in told[0] for kind in ("2 .mp4", "2 .png", "1 .txt", "1 extra"))


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = classes(tmp_path / "root", "a", "b")
    more = classes(tmp_path / "elsewhere", "more", "c")
    (root / "c").symlink_to(more / "c")
    (root / "a" / "more").symlink_to(more / "more")
    (root / "a" / "twice").symlink_to(more / "more")
    (root / "a" / "above").symlink_to(root)
    (root / "b" / "itself").symlink_to(root / "b")
    data = folder(root)
    assert data.class_names == ("a", "b", "c")
    data.setup()
    assert data.train_data is not None and data.test_data is not None and data.val_data is not None
    labels = torch.cat([part.labels for part in (data.train_data, data.val_data, data.test_data)])
    assert labels.bincount().tolist() == [8, 4, 4]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    root = classes(tmp_path, "a", "b")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png"):
        folder(root).setup()
    data = ImageFolder(str(root), image_size=8, batch_size=1, val_fraction=0.0, test_fraction=0.0, on_corrupt="skip")
    data.setup("fit")
    assert data.train_data is not None and len(data.train_data) == 8


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", None, "Test"),
        ("training", None, "testing"),
        ("train", "valid", "test"),
        ("TRAIN", "VALIDATION", "TEST"),
        ("train", "val", None),
    ],
)
def test_parts_by_other_names(train: str, val: str | None, test: str | None, tmp_path: Path) -> None:
    root = classes(tmp_path, f"{train}/a", f"{train}/b", num=8)
    if val:
        classes(root, f"{val}/a", f"{val}/b", num=3)
    if test:
        classes(root, f"{test}/a", f"{test}/b", num=2)
    data = folder(root)
    assert data.class_names == ("a", "b")
    expected = [12, 4, 4] if not val else ([16, 6, 4] if test else [12, 4, 6])
    assert counts(root) == expected


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["animals/cat", "animals/dog"], "holds one class, animals: name the folder above the classes"),
        (["train/cat"], "train holds one class, cat: name the folder above the classes"),
        (["train/a", "train/b", "val/a", "validation/b"], "holds train, val, validation: name its parts"),
        (["seg_train/a", "seg_test/a"], "holds seg_test, seg_train: name its parts"),
        (["train2017/a", "val2017/a"], "holds train2017, val2017: name its parts"),
        (["val/a", "test/a"], "holds test, val: name its parts"),
        (["cat", "dog", "test/cat"], "holds test: name its parts"),
        (["train", "test"], "holds test, train: name its parts"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat holds test, train: put the class folders"),
    ],
)
def test_a_root_one_level_off_is_refused(folders: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        folder(classes(tmp_path, *folders))


def test_words_of_parts_may_be_classes(tmp_path: Path) -> None:
    assert folder(classes(tmp_path / "1", "bus", "train", "car")).class_names == ("bus", "car", "train")
    names = ("airport/2019", "train_station/2019", "valley/2019")
    assert folder(classes(tmp_path / "2", *names)).class_names == ("airport", "train_station", "valley")


def test_a_root_one_level_off_ends_the_command(command, digits, logs, tmp_path):
    classes(tmp_path / "wrong", "animals/cats", "animals/dogs")
    without = [arg for arg in digits if not arg.startswith("--data")]
    options = ["--data=project.data.ImageFolder", f"--data.root={tmp_path / 'wrong'}", "--data.image_size=8"]
    status, _, err = command("fit", *without, *options)
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    assert "holds one class, animals: name the folder above the classes" in err
    shutil.rmtree(tmp_path / "wrong")
