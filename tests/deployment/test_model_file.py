"""Every net in every format: written, read again by its own runtime, equal; and what is answered to a bad file."""

import copy
import csv
import shutil
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from helpers.nets import NETS, images_for, masked_and_thinned, recipe_of
from helpers.slow import fast
from PIL import Image

from project.compression import Quantizer
from project.deployment.export import Format, export, export_onnx
from project.deployment.model_file import Metadata, ModelFile
from project.deployment.recipe import Recipe
from project.frame.paths import MODEL_FILES, Run
from project.models import SmallInception

FORMATS: tuple[Format, ...] = ("onnx", "onnx-int8", "pt2", "packed")
QUICK = "SmallInception-28"


def metadata(shape: tuple[int, int, int]) -> Metadata:
    channels = shape[0]
    return Metadata(("null", "eins", "zwei", "drei", "für"), shape, (0.3,) * channels, (0.4,) * channels)


@cache
def pair_of(name: str) -> tuple[tuple[torch.nn.Module, Recipe], tuple[torch.nn.Module, Recipe]]:
    net, thinned, plan = masked_and_thinned(name, 0.5)
    return (net, recipe_of(name)), (thinned, recipe_of(name, (plan,)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("thinned", fast([True, False]))
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == QUICK else [pytest.mark.slow]) for n in NETS])
def test_a_file_gives_the_nets_logits_at_every_batch(name: str, thinned: bool, format: Format, tmp_path: Path) -> None:
    (net, recipe), shape = pair_of(name)[thinned], NETS[name][1]
    images = images_for(name)
    tolerance = 1.0 if format == "onnx-int8" else None  # of random weights; what int8 loses is measured elsewhere
    done = export(
        net, tmp_path / MODEL_FILES[format], metadata(shape), images, format=format, calibration=images,
        quantizer=Quantizer(observer="min-max", weight_observer="mse"), tolerance=tolerance, recipe=recipe,
    )  # fmt: skip
    file = ModelFile(done.path)
    assert file.metadata == metadata(shape)
    assert done.difference <= (0.8 if format == "onnx-int8" else 5e-5)
    assert done.path.stat().st_size > 1000
    with torch.no_grad():
        expected = net.eval()(images)
    limit = (0.8 if format == "onnx-int8" else 5e-5) * expected.abs().max()
    for batch in (images[:1], images[:3], images):
        assert (file.logits(batch.contiguous()) - expected[: len(batch)]).abs().max() <= limit


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("format", ["pt2", "packed"])
def test_torchs_own_files_give_the_nets_bits(format: Format, order: torch.memory_format, tmp_path: Path) -> None:
    """In both memory layouts: norms of few values may magnify the rounding of the other one without limit."""
    (net, recipe), shape = pair_of(QUICK)[0], NETS[QUICK][1]
    net = copy.deepcopy(net).to(memory_format=order)
    images = torch.randn(100, *shape)
    path = tmp_path / MODEL_FILES[format]
    assert export(net, path, metadata(shape), images, format=format, recipe=recipe).difference == 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each format."""
    folder = tmp_path_factory.mktemp("files")
    (net, recipe), shape = pair_of(QUICK)[1], NETS[QUICK][1]
    for format in FORMATS:
        images = images_for(QUICK)
        export(
            net, folder / MODEL_FILES[format], metadata(shape), images, format=format, calibration=images, tolerance=1,
            recipe=recipe,
        )  # fmt: skip
    return folder


@pytest.mark.slow
def test_int8_weights_take_a_quarter(folder: Path) -> None:
    net, _ = pair_of(QUICK)[1]
    parameters = sum(p.numel() for p in net.parameters())
    nodes = len(onnx.load(folder / "model_int8.onnx").graph.node)
    assert (folder / "model_int8.onnx").stat().st_size < parameters + 12 * 600 + 200 * nodes


@pytest.mark.parametrize("name", MODEL_FILES.values())
def test_images_are_normalised_as_the_file_says(folder: Path, name: str) -> None:
    file = ModelFile(folder / name)
    pixels = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = file.logits(((pixels.float() / 255 - 0.3) / 0.4).contiguous()).softmax(1)
    torch.testing.assert_close(file.probabilities(pixels), expected)
    with pytest.raises(ValueError, match=r"takes \[N, 1, 28, 28\]"):
        file.probabilities(pixels[:, :, 1:])


def test_a_file_that_differs_is_not_kept(tmp_path: Path) -> None:
    (net, _), images = pair_of(QUICK)[0], images_for(QUICK)
    path = tmp_path / "model_int8.onnx"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"more than the tolerance 1e-09"):
        export(net, path, metadata((1, 28, 28)), images, format="onnx-int8", calibration=images, tolerance=1e-9)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "old")]


@pytest.mark.parametrize("name", MODEL_FILES.values())
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_a_truncated_file_is_refused(folder: Path, name: str, keep: float, tmp_path: Path) -> None:
    content = (folder / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="damaged or no model") as error:
        ModelFile(path)
    assert "\n" not in str(error.value)


def test_files_of_other_makers_are_refused(tmp_path: Path) -> None:
    export_onnx(SmallInception(10, (1, 8, 8)), tmp_path / "bare.onnx", (1, 8, 8))
    (tmp_path / "model.txt").write_text("")
    for name, words in (("bare.onnx", "project export"), ("model.txt", "ends in"), ("nix.onnx", "no such file")):
        with pytest.raises(ValueError, match=words):
            ModelFile(tmp_path / name)


def test_predict_needs_the_file_alone(folder: Path, tmp_path: Path, command, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        Image.new("L", (40, 30), 60 * index).save(tmp_path / f"{index}.png")
    tables = []
    for name in MODEL_FILES.values():
        status, out, err = command("predict", "--model", folder / name, "--images", tmp_path)
        assert status == 0 and "3 predictions: predictions.csv" in out, err
        with (tmp_path / "predictions.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    assert list(tables[0][0])[3:] == ["null", "eins", "zwei", "drei", "für"]
    assert [row["class"] for row in tables[0]] == [row["class"] for row in tables[2]]
    (tmp_path / "1.png").write_text("no image")
    status, _, err = command("predict", "--model", folder / "model.onnx", "--images", tmp_path)
    assert status == 0, err
    with (tmp_path / "predictions.csv").open() as file:
        marked = list(csv.DictReader(file))
    assert [row["class"] == "unreadable" for row in marked] == [False, True, False]
    assert [row["confidence"] for row in marked] == [tables[0][0]["confidence"], "", tables[0][2]["confidence"]]
    for arguments, words in (
        (["--model", "nix.onnx", "--images", "."], "no such file"),
        ([f"--model={tmp_path / '0.png'}", "--images", "."], "ends in"),
        (["--model", folder / "model.onnx", "--images", "nowhere"], "nowhere"),
        (["--model", folder / "model.onnx"], "images"),
        (["--model", folder / "model.onnx", "--imges", "."], "Did you mean 'images'"),
    ):
        status, _, err = command("predict", *arguments)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1, err


def test_other_verbs_take_no_model_file(folder: Path, command) -> None:  # type: ignore[no-untyped-def]
    status, _, err = command("validate", "--model", folder / "model.pt2")
    assert status == 2 and "validate does not take a model file" in err and len(err.strip().splitlines()) == 1


def test_a_negative_tolerance_is_refused(tmp_path: Path) -> None:
    (net, _), images = pair_of(QUICK)[0], images_for(QUICK)
    with pytest.raises(ValueError, match="tolerance is -1"):
        export(net, tmp_path / "model.onnx", metadata((1, 28, 28)), images, tolerance=-1)


@pytest.mark.slow
def test_export_of_a_run(command, digits, logs) -> None:  # type: ignore[no-untyped-def]
    assert command("fit", *digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")[0] == 0
    run = Run.find(logs / "digits")
    for format in ("onnx", "onnx-int8"):
        options = ["--format", format, "--quantizer.observer", "percentile", "--quantizer.num_images", "64"]
        status, out, err = command("export", "--run", logs / "digits", *options)
        assert status == 0 and f"{run.model_file(format)}: " in out and "get the same class" in out, err
        assert ModelFile(run.model_file(format)).metadata.class_names == tuple("0123456789")
    status, out, err = command("test", "--model", run.model_file("onnx"), "--config", run.config)
    assert status == 0 and "% of 359 images" in out, err
    status, _, err = command("unpack", "--model", run.model_file("onnx"))
    assert status == 2 and "only packed files" in err, err
    shutil.rmtree(run.checkpoints)
    for arguments, words in (
        (["--run", logs / "digits"], "has no checkpoint"),
        (["--run", logs / "digits", "--format", "onyx"], "onnx-int8"),
        (["--run", logs / "nix"], "no such folder"),
        (digits, "needs trained weights"),
    ):
        status, _, err = command("export", *arguments)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.slow
def test_the_layers_that_stay_in_fp32_are_named(command, digits, logs, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert command("fit", *digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")[0] == 0
    options = ["--format", "onnx-int8", "--quantizer.float_layers", "2", "--output", str(tmp_path / "mixed.onnx")]
    status, out, err = command("export", "--run", logs / "digits", *options)
    assert status == 0 and "stay in fp32: " in out and (tmp_path / "mixed.onnx").is_file(), err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("class_names", value) for value in ('["a"]', '["a", 3, "c", "d", "e"]', '"abcde"', "[]", "{}", "3", "[")),
        *(("image_shape", value) for value in ("[1, 28]", "[1, 28, 0]", "[1, 28, 2.5]", "[1, 9, 9]", '["1", 28, 28]')),
        *(("std", value) for value in ("[0]", "[1e-320]", "[NaN]", "[0.4, 0.4]", "null")),
        ("mean", "[1" + "0" * 30 + "]"),
    ],
)
def test_metadata_outside_their_range_are_refused(folder: Path, field: str, value: str, tmp_path: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    for entry in model.metadata_props:
        if entry.key == field:
            entry.value = value
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"model\.onnx") as error:
        file = ModelFile(tmp_path / "model.onnx")
        file.probabilities(torch.zeros(2, *file.metadata.image_shape, dtype=torch.uint8))
    assert "\n" not in str(error.value) and "project export" in str(error.value)


@pytest.mark.slow
def test_three_runtimes_agree_on_real_images(command, digits, logs) -> None:  # type: ignore[no-untyped-def]
    """ONNX Runtime, OpenVINO and onnx's own evaluator, which shares no code with them."""
    pytest.importorskip("openvino")
    from onnx.reference import ReferenceEvaluator

    from project.data import Digits
    from project.deployment.engines import openvino_engine

    assert command("fit", *digits[:2], "--trainer.observe=false")[0] == 0  # a net that is sure of its images
    data = Digits()
    pixels, _ = data.load(train=False)
    images = data.normalize(pixels.float().div_(255)).contiguous()
    for format in ("onnx", "onnx-int8"):
        assert command("export", "--run", logs / "digits", "--format", format)[0] == 0
        path = Run.find(logs / "digits").model_file(format)
        onnx.checker.check_model(str(path), full_check=True)
        (logits,) = ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})
        expected = torch.from_numpy(logits).argmax(1)
        for engine in (ModelFile(path).logits, openvino_engine(path)):
            assert (engine(images).argmax(1) == expected).float().mean() >= 0.997  # one of 359 may tie


@pytest.mark.parametrize(("text", "answer"), [("data: [1, 2", "is no YAML"), ("- a", "holds no keys")])
def test_a_damaged_configuration_is_refused(folder: Path, text: str, answer: str, tmp_path: Path, command) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "c.yaml").write_text(text)
    status, _, err = command("test", "--model", str(folder / "model.onnx"), "--config", str(tmp_path / "c.yaml"))
    assert status == 2 and "c.yaml" in err and answer in err and err.count("\n") == 1, err


def test_a_place_or_name_that_no_file_can_have_is_refused_first(
    folder: Path, tmp_path: Path, command, digits, logs
) -> None:  # type: ignore[no-untyped-def]
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    for verb in (["predict", "--model", str(folder / "model.onnx"), "--images", str(tmp_path / "x.png")],
                 ["unpack", "--model", str(folder / "model.packed")]):  # fmt: skip
        status, _, err = command(*verb, "--output", str(tmp_path))
        assert status == 2 and "it is a folder: give --output FILE" in err and err.count("\n") == 1, err
    assert command("fit", *digits, "--trainer.max_epochs=1")[0] == 0
    status, _, err = command("export", "--run", str(logs / "digits"), "--output", str(tmp_path / "m.pt2"))
    assert (
        status == 2 and "files of format onnx end in .onnx: rename it" in err and not (tmp_path / "m.pt2").exists()
    ), err
