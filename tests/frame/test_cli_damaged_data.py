"""What the command line says of damaged or missing files: one sentence that names the file, and exit status 2."""

import csv
import gzip
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

from project.frame.prediction import image_loader, mark_unreadable_


def image_folder(root: Path) -> list[str]:
    """Ten images of each of two classes, and the options that train on them."""
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(10):
            Image.new("L", (12, 10), 20 * index).save(root / name / f"{index}.png")
    data = ["--data=project.data.ImageFolder", f"--data.root={root}", "--data.image_size=8", "--data.batch_size=8"]
    return [*data, "--data.val_fraction=0.2"]


def refusal(command, digits, options: list[str]) -> str:
    """The one line that ``project fit`` ends with."""
    without = [arg for arg in digits if not arg.startswith("--data")]
    status, _, err = command("fit", *without, *options, "--trainer.max_epochs=1")
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_whole_images_train(command, digits, logs, tmp_path):
    options = image_folder(tmp_path / "images")
    status, _, err = command("fit", *digits, *options, "--trainer.max_epochs=1")
    assert status == 0, err


def test_empty_class_folder(command, digits, logs, tmp_path):
    options = image_folder(tmp_path / "images")
    (tmp_path / "images" / "emu").mkdir()
    assert "emu" in refusal(command, digits, options)


@pytest.mark.slow
def test_truncated_image(command, digits, logs, tmp_path):
    options = image_folder(tmp_path / "images")
    path = tmp_path / "images" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    assert "3.png" in refusal(command, digits, options)
    status, _, err = command("fit", *digits, *options, "--data.on_corrupt=skip", "--trainer.max_epochs=1")
    assert status == 0, err


@pytest.mark.parametrize("damage", ["cut", "magic"])
def test_damaged_idx_file(damage, command, digits, logs, tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        images = struct.pack(">4i", 2051, count, 28, 28) + bytes(count * 784)
        labels = struct.pack(">2i", 2049, count) + bytes(index % 10 for index in range(count))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    broken = folder / "train-labels-idx1-ubyte"
    content = broken.read_bytes()
    broken.write_bytes(content[:-7] if damage == "cut" else b"\x01\x02\x03\x04" + content[4:])
    options = ["--data=project.data.MNIST", f"--data.data_dir={tmp_path}", "--data.batch_size=8"]
    assert "train-labels-idx1-ubyte" in refusal(command, digits, options)


def test_corrupt_image_in_predict(command, digits, logs, tmp_path):
    assert command("fit", *digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")[0] == 0
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    (tmp_path / "nothing").mkdir()
    for name in ("broken.png", "nothing", "nowhere.png"):
        status, _, err = command("predict", "--run", str(logs / "digits"), "--images", str(tmp_path / name))
        assert status == 2 and name in err and len(err.strip().splitlines()) == 1, err
    assert not (logs / "digits/version_0/predictions.csv").exists()


def test_predict_marks_a_bad_file_and_goes_on(command, digits, logs, tmp_path):
    assert command("fit", *digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")[0] == 0
    images = tmp_path / "images"
    images.mkdir()
    for index in (0, 2, 3):
        Image.new("L", (12, 10), 60 * index).save(images / f"{index}.png")
    (images / "1.png").write_bytes(b"\x89PNG no more")
    status, out, err = command("predict", "--run", str(logs / "digits"), "--images", str(images))
    assert status == 0 and "images/1.png is truncated or no image" in out + err, err
    with (logs / "digits/version_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in rows] == [f"{index}.png" for index in range(4)]
    bad = rows.pop(1)
    assert bad.pop("class") == "unreadable" and bad.pop("file") and set(bad.values()) == {""}
    assert all(0.1 <= float(row["confidence"]) <= 1 and row["class"].isdigit() for row in rows)

    alone = tmp_path / "alone"
    alone.mkdir()
    for index in (0, 2, 3):
        (images / f"{index}.png").rename(alone / f"{index}.png")
    output = tmp_path / "alone.csv"
    assert command("predict", "--run", str(logs / "digits"), "--images", str(alone), "--output", str(output))[0] == 0
    with output.open() as file:
        assert [row["confidence"] for row in csv.DictReader(file)] == [row["confidence"] for row in rows]

    (images / "5.png").write_text("no image")
    status, _, err = command("predict", "--run", str(logs / "digits"), "--images", str(images))
    assert status == 2 and "none of 2 files can be read" in err.splitlines()[-1], err


def test_each_process_marks_its_own_rows(tmp_path):
    for index in range(5):
        Image.new("L", (8, 8)).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_text("no image")
    for rank, bad in ((0, []), (1, [1])):
        loader, _ = image_loader(tmp_path, (1, 8, 8))
        share = range(rank, 5, 2)
        loader.dataset.__getitems__(list(share))
        marked = mark_unreadable_(torch.full((len(share), 3), 1 / 3), loader, rank, 2)
        assert (marked == -1).all(dim=1).nonzero()[:, 0].tolist() == bad
