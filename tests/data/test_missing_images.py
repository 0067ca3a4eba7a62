"""Runs on image folders that lack something: a class, the test images, or all images of a batch."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from project.data import ImageFolder
from project.frame.paths import Run
from project.frame.verbs import VERBS
from project.learning import Classifier


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder apart from that of the runs."""
    return tmp_path / "images"


def write(folder: Path, num: int) -> None:
    folder.mkdir(parents=True)
    for k in range(num):
        Image.new("L", (8, 8), 30 * k + 10).save(folder / f"{k}.png")


def options(digits: list[str], root: Path, *more: str) -> list[str]:
    without = [arg for arg in digits if not arg.startswith("--data")]
    data = ["--data=project.data.ImageFolder", f"--data.root={root}", "--data.image_size=8", "--data.channels=1"]
    return [*without, *data, "--data.batch_size=4", "--data.augment=[]", "--trainer.max_epochs=1", *more]


def test_a_class_without_test_images_has_no_accuracy(command, digits, logs, root):
    for name, num in (("train/cat", 8), ("train/dog", 8), ("train/emu", 8), ("test/cat", 4), ("test/dog", 2)):
        write(root / name, num)
    status, out, err = command("fit", *options(digits, root))
    assert status == 0, err
    assert "the test set holds no images of emu" in out + err
    summary = json.loads((logs / "digits/version_0/summary.json").read_text())
    tested = {key: value for key, value in summary.items() if key.startswith("test/accuracy")}
    assert set(tested) == {"test/accuracy", "test/accuracy/cat", "test/accuracy/dog"}
    whole = (4 * tested["test/accuracy/cat"] + 2 * tested["test/accuracy/dog"]) / 6
    assert tested["test/accuracy"] == pytest.approx(whole)


def test_per_class_accuracies_are_exact() -> None:
    model = Classifier(torch.nn.Flatten(), num_classes=4, image_shape=(1, 2, 2), class_names=("a", "b", "c", "d"))
    logged: dict[str, float] = {}
    model._log = lambda values: logged.update({k: float(v) for k, v in values.items()})  # type: ignore[method-assign]
    for predicted, labels in (([0, 1, 1], [0, 0, 1]), ([3], [0])):
        images = torch.nn.functional.one_hot(torch.tensor(predicted), 4).float().view(-1, 1, 2, 2)
        model.test_step((images, torch.tensor(labels)), 0)
    model.on_test_epoch_end()
    assert logged["test/accuracy/a"] == pytest.approx(1 / 3) and logged["test/accuracy/b"] == 1
    assert logged["test/accuracy"] == 0.5
    assert not {"test/accuracy/c", "test/accuracy/d"} & set(logged)


@pytest.mark.parametrize("part", ["training", "validation", "test"])
def test_a_split_that_leaves_a_class_out_says_so(part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name, 8)
    write(tmp_path / "emu", 1 if part != "training" else 2)
    if part == "training":
        for k in range(2):
            (tmp_path / "emu" / f"{k}.png").write_text("no image")
    data = ImageFolder(str(tmp_path), image_size=8, batch_size=1, val_fraction=0.2, on_corrupt="skip", in_memory=True)
    data.setup("test" if part == "test" else "fit")
    told = [record.message for record in caplog.records if "holds no images of" in record.message]
    assert f"the {part} set holds no images of emu" in "".join(told)


def test_a_whole_split_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name, 8)
    ImageFolder(str(tmp_path), image_size=8, batch_size=1, val_fraction=0.0).setup()
    assert caplog.text == ""


def test_without_test_images_a_fit_ends_well_and_a_test_is_refused(command, digits, logs, root):
    for name in ("cat", "dog"):
        write(root / name, 8)
    status, out, err = command("fit", *options(digits, root, "--data.test_fraction=0"))
    assert status == 0 and "no test images" in out + err, err
    summary = json.loads((logs / "digits/version_0/summary.json").read_text())
    assert not any(key.startswith("test/") for key in summary)
    status, _, err = command("test", "--run", str(logs / "digits"))
    assert status == 2 and "the test set holds no images" in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "onnx-int8", "pt2", "packed"])
def test_without_test_images_a_file_is_checked_on_training_images(command, digits, logs, root, format):
    pytest.importorskip("project.deployment.export")
    for name in ("cat", "dog"):
        write(root / name, 8)
    assert command("fit", *options(digits, root, "--data.test_fraction=0"))[0] == 0
    status, out, err = command("export", "--run", str(logs / "digits"), "--format", format)
    assert status == 0 and "training images a logit differs" in out + err, err
    assert Run.find(logs / "digits").model_file(format).is_file()


def test_weights_for_other_classes_are_refused_but_a_fit_may_start_from_them(command, digits, logs, root):
    for name in ("cat", "dog"):
        write(root / name, 8)
    assert command("fit", *options(digits, root))[0] == 0
    run = Run.find(logs / "digits")
    (root / "cat").rename(root / "elk")  # now the dog comes first
    for verb in ("test", "validate", "export"):
        if verb in VERBS or verb != "export":
            status, _, err = command(verb, "--run", str(run.folder))
            assert status == 2 and "class cat, the data have dog" in err and err.count("\n") == 1, err
    for more in (["--resume", str(run.folder)], [*options(digits, root), f"--ckpt_path={run.last_checkpoint}"]):
        status, _, err = command("fit", *more, "--trainer.max_epochs=2")
        assert status == 2 and "or begin a fit with its --weights" in err and err.count("\n") == 1, err
    status, _, err = command("fit", *options(digits, root, f"--weights={run.best_checkpoint}"))
    assert status == 0, err


@pytest.mark.slow
def test_a_batch_of_skipped_files_teaches_nothing(command, digits, logs, root):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        write(root / name, 8)
    for path in [*(root / "train").rglob("[0-3].png"), *(root / "test" / "cat").iterdir()]:
        path.write_text("no image")
    more = ["--data.on_corrupt=skip", "--data.in_memory=false", "--data.batch_size=2", "--data.eval_batch_size=2"]
    more += ["--data.val_fraction=0.25", "--trainer.observe=true", "--trainer.callbacks=StopOnNaN"]
    status, _, err = command("fit", *options(digits, root, *more, "--trainer.callbacks.every_n_steps=1"))
    assert status == 0, err
    with (logs / "digits/version_0/metrics.csv").open() as file:
        values = [float(value) for row in csv.DictReader(file) for value in row.values() if value]
    assert values and all(map(math.isfinite, values))


def test_an_empty_batch_changes_no_weight() -> None:
    model = Classifier(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)), 3, (1, 2, 2)
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss = model.training_step((torch.empty(0, 1, 2, 2), torch.empty(0, dtype=torch.int64)), 0)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("part", "word"), [("test", "test"), ("val", "validation")])
def test_a_part_of_skipped_files_is_refused(part, word, command, digits, logs, root):
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog"):
        write(root / name, 8)
    for path in (root / part).rglob("*.png"):
        path.write_text("no image")
    more = ["--data.on_corrupt=skip", "--data.in_memory=false"]
    status, _, err = command("fit", *options(digits, root, *more))
    assert status == 2 and f"every {word} image was skipped" in err, err


@pytest.mark.slow
def test_images_of_nearly_one_colour_are_told_once(command, digits, logs, root):
    """12-bit colours in a file of 16 bits a channel, of which Pillow keeps the upper 8: nearly black."""
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for k in range(8):
            pixels = torch.arange(192).view(8, 8, 3) * (20 if k % 2 else 300)
            raw = b"".join(value.to_bytes(2, "big") for value in pixels.flatten().tolist())
            (root / name / f"{k}.ppm").write_bytes(b"P6 8 8 65535\n" + raw)
    more = ["--data.channels=3", "--trainer.observe=true", "--data.test_fraction=0", "--data.val_fraction=0.25"]
    status, out, err = command("fit", *options(digits, root, *more))
    assert status == 0, err
    told = [line for line in (out + err).splitlines() if "nearly one colour" in line]
    data = ImageFolder(str(root), image_size=8, batch_size=1, val_fraction=0.25, test_fraction=0.0)
    data.setup("fit")
    assert data.train_data is not None
    dark = sum(int(images.max()) < 16 for images in data.train_data.__getitems__(list(range(12)))[0])
    assert len(told) == 1 and told[0].startswith(f"{dark} of 12 training images"), out
    assert 0 < dark < 12
