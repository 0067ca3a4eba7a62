"""Any ``nn.Module``, named in YAML, through every verb; each verb builds it again from what the run's folder holds."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from PIL import Image

from project.deployment.recipe import Recipe
from project.frame.paths import Run

ROOT = Path(__file__).resolve().parents[1]

NETS = {
    "a function of torchvision": {"class_path": "torchvision.models.squeezenet1_1"},
    "a class of torchvision": {"class_path": "torchvision.models.SqueezeNet", "init_args": {"version": "1_1"}},
    "a function of timm": {
        "class_path": "timm.create_model",
        "init_args": {"model_name": "test_resnet", "in_chans": 3, "drop_rate": 0.1},
    },
    "a default that is no text": {
        "class_path": "torchvision.models.VisionTransformer",
        "init_args": {
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 1,
            "num_heads": 2,
            "hidden_dim": 8,
            "mlp_dim": 8,
        },
    },
    "num_outputs": {"class_path": "helpers.foreign_nets.NumOutputs"},
    "untyped": {"class_path": "helpers.foreign_nets.Untyped", "init_args": {"width": 6}},
    "untyped, a class as default": {"class_path": "helpers.foreign_nets.ClassDefault", "init_args": {"width": 6}},
    "**kwargs": {"class_path": "helpers.foreign_nets.Keywords", "init_args": {"width": 6}},
    "fixed": {"class_path": "helpers.foreign_nets.Fixed"},
    "lazy": {"class_path": "helpers.foreign_nets.Lazy"},
    "a function": {"class_path": "helpers.foreign_nets.build"},
}
NAMES = {"num_outputs": {"num_outputs": "num_classes", "in_planes": "num_channels"}}


@pytest.fixture
def configuration(tmp_path: Path):
    """``configuration(net)`` writes the YAML of a run on colour digits."""

    def write(net: str) -> str:
        path = tmp_path / "net.yaml"
        data = {"class_path": "helpers.foreign_nets.ColourDigits", "init_args": {"batch_size": 50}}
        trainer = {"max_epochs": 1, "observe": False, "experiment": "run"}
        values = {"data": data, "model": {"net": NETS[net]}, "trainer": trainer, "net_arguments": NAMES.get(net)}
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (90, 120, 200)).save(path)
    return str(path)


def probabilities(path: Path) -> list[float]:
    with path.open(newline="") as file:
        row = next(csv.DictReader(file))
    return [float(row[str(digit)]) for digit in range(10)]


@pytest.mark.parametrize("net", ["num_outputs", pytest.param("a function of timm", marks=pytest.mark.slow)])
def test_a_run_is_predicted_with_and_packed(net, command, configuration, logs, image, tmp_path):
    """The fast part: the classes are the data's, and checkpoint and packed file rebuild the same net."""
    if "timm" in net:
        pytest.importorskip("timm")
    status, _, err = command("fit", "--config", configuration(net), "--trainer.test_after_fit=false")
    assert status == 0, err
    run = Run.find(logs / "run")
    predicted = [tmp_path / "a.csv", tmp_path / "b.csv"]
    status, _, err = command("predict", "--run", str(run.folder), "--images", image, "--output", str(predicted[0]))
    assert status == 0, err
    status, _, err = command("export", "--run", str(run.folder), "--format", "packed", "--num_images=8")
    assert status == 0, err
    file = ["predict", "--model", str(run.folder / "model.packed"), "--images", image, "--output", str(predicted[1])]
    package = NETS[net]["class_path"].partition(".")[0]
    status, _, err = command(*file)
    assert status == 2 and f"--trust {package}" in err and len(err.strip().splitlines()) == 1
    status, _, err = command(*file, "--trust", package)
    assert status == 0, err
    assert probabilities(predicted[0]) == pytest.approx(probabilities(predicted[1]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "net", ["a function of torchvision", "a function of timm", "untyped, a class as default", "**kwargs", "lazy"]
)
def test_every_verb(net, command, configuration, logs, image):
    if "timm" in net:
        pytest.importorskip("timm")
    config = configuration(net)

    def succeed(*args: str) -> None:
        status, _, err = command(*args)
        assert status == 0, err

    succeed("fit", "--config", config)
    run = Run.find(logs / "run")
    before = json.loads(run.summary.read_text())
    succeed("test", "--run", str(run.folder))
    assert json.loads(run.summary.read_text()) == before
    succeed("predict", "--run", str(run.folder), "--images", image)
    for format in ("onnx", "pt2", "packed"):
        succeed("export", "--run", str(run.folder), "--format", format)
    succeed("export", "--run", str(run.folder), "--format", "onnx-int8")
    taught = ["--trainer.callbacks+=project.callbacks.DistillFrom", f"--trainer.callbacks.teacher={run.folder}"]
    succeed("fit", "--config", config, "--trainer.experiment=taught", "--trainer.test_after_fit=false", *taught)
    options = ["--engines", "eager", "--rounds=1", "--num_images=10", "--memory=false"]
    (logs / "taught" / "version_0" / "model.packed").write_bytes((run.folder / "model.packed").read_bytes())
    succeed("benchmark", "--run", str(run.folder), "--compare", str(logs / "taught"), *options)
    succeed("fit", "--resume", str(run.folder), "--trainer.max_epochs=2")
    assert torch.load(run.last_checkpoint, weights_only=True)["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("net", ["a function of torchvision", "untyped"])
def test_a_fresh_process_needs_the_checkpoint_alone(net, command, configuration, logs, image):
    assert command("fit", "--config", configuration(net))[0] == 0
    run = Run.find(logs / "run")
    code = (
        "import sys; from project.models import Classifier;"
        "print(Classifier.load_from_checkpoint(sys.argv[1], map_location='cpu').num_classes)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.best_checkpoint)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "10", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wide_resnet50_2", "swin_t", "vit_b_16", "shufflenet_v2_x0_5", "alexnet"])
def test_a_functions_own_defaults_win(name, monkeypatch, logs):
    """These put other values in the place of those that a look at the code finds, or have defaults that are no text."""
    from project.frame.cli import CLI
    from project.frame.net_arguments import build_net

    monkeypatch.setattr("sys.argv", ["project"])
    options = ["--data=helpers.foreign_nets.ColourDigits", f"--model.net=torchvision.models.{name}"]
    with torch.device("meta"):
        described = CLI(options, run=False).model.hparams["net"]
        expected = getattr(torchvision.models, name)(num_classes=10).state_dict()
        built = build_net(described).state_dict()
    assert {key: value.shape for key, value in built.items()} == {key: value.shape for key, value in expected.items()}
    assert Recipe(described).build(["torchvision"]).state_dict().keys() == expected.keys()


MISTAKES = {
    "channels": (["torchvision.models.squeezenet1_1"], "takes 3 channels, but the data's images 1x8x8 have 1"),
    "size": (["torchvision.models.vit_b_16", "--model.net.image_size=32"], "cannot take the data's images 1x8x8"),
    "aux heads": (["torchvision.models.GoogLeNet", "--model.net.init_weights=false"], "1x8x8 have 1"),
    "classes": (
        ["helpers.foreign_nets.NumOutputs", "--model.net.num_outputs=5"],
        "net_arguments: {num_outputs: num_classes}",
    ),
    "missing": (["helpers.foreign_nets.NumOutputs"], "argument num_outputs is missing"),
    "unknown argument": (["helpers.foreign_nets.NumOutputs", "--model.net.widht=5"], "'widht' is not accepted"),
    "unknown value": (
        ["helpers.foreign_nets.NumOutputs", "--net_arguments={num_outputs: num_clases}"],
        "the value 'num_clases', but the data have num_classes",
    ),
    "unknown target": (
        ["helpers.foreign_nets.NumOutputs", "--net_arguments={num_output: num_classes}"],
        "no such argument: did you mean num_outputs?",
    ),
    "loss": (["helpers.own_net.OwnNet", "--model.loss=torch.nn.MSELoss"], "model.loss is MSELoss"),
    "unannotated": (["helpers.foreign_nets.nohint"], "must say `-> torch.nn.Module`"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_before_the_first_step(mistake, command, logs):
    options, words = MISTAKES[mistake]
    status, _, err = command("fit", "--data=project.data.Digits", f"--model.net={options[0]}", *options[1:])
    assert status == 2 and words in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) == 1
    assert not list(logs.glob("*/*"))
