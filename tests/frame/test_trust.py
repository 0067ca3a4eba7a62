"""Runs that somebody else has made: none of their code runs without ``--trust``, and they write into their folder."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from project.frame import trust
from project.frame.paths import Run
from project.frame.trust import check_trusted, is_own
from project.learning import Classifier

NET = """
from pathlib import Path
from lightning.pytorch import Callback
from torch import nn

Path({mark!r}).touch()  # an import runs code

class Net(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.fc(images.flatten(1))

class Quiet(Callback):
    pass
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory and cache folder. Modules that the test imports are forgotten."""
    before = set(sys.modules)
    monkeypatch.setenv("PROJECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PROJECT_KERNELS", "0")  # nothing is compiled for this cache folder
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    trust.trusted.clear()
    for name in set(sys.modules) - before:
        if name.startswith("stranger"):
            del sys.modules[name]


TRAINED: dict[str, Path] = {}


@pytest.fixture
def train(command, digits, logs, here, tmp_path_factory):
    """Makes a run of this user's with a net of his own, ``stranger.Net``, or of the package. Each is trained once."""

    def make(net: str) -> Run:
        (here / "stranger.py").write_text(NET.format(mark=str(here / "imported")))
        if net not in TRAINED:
            options = [option for option in digits if "net" not in option] + [f"--model.net={net}"]
            status, _, err = command("fit", *options, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")
            assert status == 0, err
            TRAINED[net] = tmp_path_factory.mktemp("trained") / "run"
            shutil.move(logs / "digits/version_0", TRAINED[net])
        shutil.copytree(TRAINED[net], logs / "digits/version_0")
        trust.remember(logs / "digits/version_0/config.yaml")
        return Run.find(logs / "digits")

    return make


@pytest.fixture
def run(train):
    return train("stranger.Net")


def make_foreign(run: Run, **changes):
    """Let a run be another user's: nothing is known of its configuration. ``changes`` are dotted keys of it."""
    values = yaml.safe_load(run.config.read_text())
    for key, value in changes.items():
        *groups, last = key.split("__")
        part = values
        for group in groups:
            part = part[group]
        part[last] = value
    run.config.write_text(yaml.safe_dump(values) + "# another file\n")
    for name in [name for name in sys.modules if name.startswith("stranger")]:
        del sys.modules[name]
    Path("imported").unlink(missing_ok=True)


def files_outside(folder: Path, run: Run) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(run.folder)}


VERBS = {
    "test": ["--run", "RUN"],
    "validate": ["--run", "RUN"],
    "predict": ["--run", "RUN"],
    "predict of files": ["--run", "RUN", "--images", "photo.png"],
    "export": ["--run", "RUN", "--num_images=8"],
    "benchmark": ["--run", "RUN", "--engines", "eager", "--rounds=1", "--memory=false"],
    "test of a file": ["--ckpt_path", "RUN/checkpoints/best.ckpt"],
    "fit": ["--resume", "RUN", "--trainer.max_epochs=2", "--trainer.test_after_fit=false"],
}


def arguments(name: str, run: Run) -> list[str]:
    from PIL import Image

    Image.new("L", (8, 8), 99).save("photo.png")
    return [name.partition(" ")[0], *(word.replace("RUN", str(run.folder)) for word in VERBS[name])]


def test_ones_own_run_needs_no_trust(command, digits, logs, here):
    (here / "stranger.py").write_text(NET.format(mark=str(here / "imported")))
    options = [option for option in digits if "net" not in option] + ["--model.net=stranger.Net"]
    status, _, err = command("fit", *options, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")
    assert status == 0, err
    run = Run.find(logs / "digits")
    assert is_own(run.config)
    for name in ("test", "predict of files", "test of a file", "fit", "test"):  # the resume writes the file anew
        status, _, err = command(*arguments(name, run))
        assert status == 0, err
    assert Classifier.load_from_checkpoint(run.best_checkpoint).num_classes == 10


@pytest.mark.parametrize("name", VERBS)
def test_somebody_elses_classes_need_trust(name, command, run):
    make_foreign(run)
    words = arguments(name, run)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    status, _, err = command(*words)
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    assert "stranger.Net, which is neither of this package nor trusted" in err and "--trust stranger, if" in err
    assert not Path("imported").exists()
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    status, _, err = command(*words, "--trust", "other,stranger")
    assert status == 0 and Path("imported").exists(), err


def test_a_checkpoint_that_names_other_code_than_its_run(command, train, here):
    """The run's configuration is harmless; the checkpoint is not."""
    run = train("project.models.LeNet300100")
    make_foreign(run)
    for key, value in (("net", {"class_path": "stranger.Net"}), ("_instantiator", "stranger.Net")):
        checkpoint = torch.load(run.last_checkpoint, weights_only=True)
        checkpoint["hyper_parameters"][key] = value
        torch.save(checkpoint, run.best_checkpoint)
        status, _, err = command(*arguments("predict of files", run))
        assert status == 2 and "--trust stranger" in err and not (here / "imported").exists(), err
        with pytest.raises(trust.UntrustedError, match="--trust stranger"):
            Classifier.load_from_checkpoint(run.best_checkpoint)
    other = run.folder.parent / "version_1"
    shutil.copytree(run.folder, other)
    shutil.copyfile(run.last_checkpoint, run.best_checkpoint)
    status, _, err = command(*arguments("benchmark", run), "--compare", str(other))
    assert status == 2 and "--trust stranger" in err and not (here / "imported").exists(), err


@pytest.mark.parametrize(
    "values",
    [
        {"class_path": "os.system"},
        {"callbacks": ["logging.handlers.FileHandler"]},
        {"stranger.Net": None},
        {"class_path": "torch.hub.load"},
        {"class_path": "torch.jit.load"},
        {"class_path": "lightning.pytorch.LightningModule.load_from_checkpoint"},
        {"class_path": "project.learning.Classifier.load_from_checkpoint"},
        {"class_path": "lightning.pytorch.loggers.CSVLogger"},
        {"net": '"\\x73tranger.Net"'},
        {"callbacks": '[{"class_path": "my.Net"}]'},
        {"callbacks": "callbacks.yaml"},
    ],
)
def test_no_way_around(values, here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "stranger.py").write_text("raise AssertionError")
    (here / "callbacks.yaml").write_text("[stranger.Net]")
    with pytest.raises(ValueError, match=r"--trust|within the text"):
        check_trusted(values, "config.yaml")
    assert "stranger" not in sys.modules


@pytest.mark.parametrize(
    "value",
    ["project.models.LeNet5", "torch.nn.init.kaiming_normal_", "torch.optim.SGD", "torchvision.models.resnet18", "0.1",
     "{epoch}-{step}", "photo.png", "lightning.pytorch.callbacks.EarlyStopping", "val/accuracy", "of.nothing"],
)  # fmt: skip
def test_harmless_values(value, here):
    check_trusted({"key": [value]}, "config.yaml")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", ["test", "validate", "predict", "export", "benchmark", "fit"])
def test_somebody_elses_run_writes_into_its_folder_only(name, command, train, tmp_path):
    run = train("project.models.LeNet300100")
    away = str(tmp_path / "away")

    def parts(class_path, **init_args):
        return {"class_path": f"lightning.pytorch.{class_path}", "init_args": init_args}

    make_foreign(
        run,
        trainer__logger=[parts("loggers.CSVLogger", save_dir=away), parts("loggers.TensorBoardLogger", save_dir=away)],
        trainer__profiler=parts("profilers.SimpleProfiler", dirpath=away, filename="../profile"),
        trainer__callbacks=[
            parts("callbacks.ModelCheckpoint", dirpath=away, every_n_train_steps=1),
            parts("callbacks.OnExceptionCheckpoint", dirpath=away),
            parts("callbacks.DeviceStatsMonitor"),
        ],
        trainer__logs_dir=away,
        trainer__default_root_dir=away,
        output=f"{away}.csv",
        images="photo.png",
        ckpt_path="nowhere.ckpt",
    )
    words = arguments(name, run)
    before = files_outside(tmp_path, run)
    status, _, err = command(*words)
    assert status == 0, err
    assert files_outside(tmp_path, run) - before <= {
        tmp_path / "cache/runs" / p.name for p in tmp_path.glob("cache/runs/*")
    }


def test_a_link_out_of_somebody_elses_run(command, train, here):
    run = train("project.models.LeNet300100")
    make_foreign(run)
    run.metrics.unlink()
    (here / "mine.txt").write_text("mine")
    run.metrics.symlink_to(here / "mine.txt")
    status, _, err = command(*arguments("test", run))
    assert status == 2 and "leads out of the run's folder" in err
    assert (here / "mine.txt").read_text() == "mine"
