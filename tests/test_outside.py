"""A callback, a verb, penalties and a max-norm in files outside the package; no file of the package knows them."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

from project.frame.paths import Run

CALLBACK = '''
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class BestSoFar(Callback):
    """Logs the best value that a metric has reached so far, as ``<metric>_best``."""

    def __init__(self, metric: str = "val/accuracy") -> None:
        self.metric = metric
        self.best = float("-inf")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.best = max(self.best, trainer.callback_metrics[self.metric].item())
        pl_module.log(f"{self.metric}_best", self.best)

    def state_dict(self) -> dict[str, Any]:  # in each checkpoint: a resumed run goes on with it
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
'''
CALLBACK_YAML = """
trainer:
  callbacks+:
    - class_path: my_callback.BestSoFar
      init_args: {metric: val/accuracy}
"""
VERB = '''
import torch

from project.data import ImageDataModule
from project.frame.trainer import RunTrainer
from project.learning import Classifier


def count_labels(trainer: RunTrainer, model: Classifier, datamodule: ImageDataModule, least: int = 0) -> None:
    """Count the training images of each class.

    Args:
        least: smallest count that is shown, 0 or more.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    counts = torch.bincount(datamodule.train_data.labels, minlength=datamodule.num_classes).tolist()
    for name, count in zip(datamodule.class_names, counts, strict=True):
        if count >= least:
            print(f"{name}: {count}")
'''
FURTHER_VERBS = """
from __future__ import annotations

import torch

import my_verbs


def weigh(trainer, model, datamodule, *, parts: list[str]) -> None:
    weights = [p.detach() for name, p in model.net.named_parameters() if any(part in name for part in parts)]
    print("weight", sum(float(weight.abs().sum()) for weight in weights), "training", model.training)
    print("run", trainer.run)


def see_kernels(trainer, model, datamodule) -> None:
    from project.models.kernels.build import library

    print("kernels", library(torch.float32) is not None)


def of_the_net(model): ...
def untyped(trainer, model, datamodule, least=0): ...
def any_options(trainer, model, datamodule, **options: int): ...
def taken(trainer, model, datamodule, run: int = 0): ...
def unknown_type(trainer, model, datamodule, least: Integer = 0): ...
"""
PENALTIES = '''
import torch
from torch import Tensor, nn


class Orthogonal(nn.Module):
    """Distance of the last layer's rows from orthogonal ones."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, net: nn.Module) -> Tensor:
        weight = [module for module in net.modules() if isinstance(module, nn.Linear)][-1].weight
        gram = weight @ weight.T
        return self.strength * (gram - torch.diag(gram.diagonal())).square().sum()


class PerLayer(Orthogonal):
    def forward(self, net):
        return torch.stack([p.sum() for p in net.parameters()])


class Clip(nn.Module):
    """Keeps each weight within a bound."""

    def __init__(self, bound: float = 0.1) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, net: nn.Module) -> None:
        for parameter in net.parameters():
            parameter.clamp_(-self.bound, self.bound)


class OfALayer(nn.Module):
    def forward(self, weight):
        weight.clamp_(-1, 1)
'''
FILES = {
    "my_callback.py": CALLBACK,
    "my_callback.yaml": CALLBACK_YAML,
    "my_verbs.py": VERB,
    "my_further_verbs.py": FURTHER_VERBS,
    "my_penalties.py": PENALTIES,
    "my_broken_verbs.py": "def count(:",
    "my_importer.py": "import my_lost_module",
}


@pytest.fixture
def outside(command, digits, logs, tmp_path, monkeypatch):
    """``outside("fit", …)`` runs a verb on digits in a working directory that holds the files."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    yield lambda verb, *options: command(verb, *digits, *options)
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


ONE_EPOCH = ["--trainer.max_epochs=1", "--trainer.test_after_fit=false"]


def read_best(run: Run) -> list[tuple[float, float]]:
    """Of each epoch: the metric and its best value so far."""
    with run.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [[float(row[name]) for row in rows if row.get(name)] for name in ("val/accuracy", "val/accuracy_best")]
    return list(zip(*columns, strict=True))


def test_a_callback_logs_and_goes_on_after_a_resume(outside, command, logs):
    status, _, err = outside("fit", "--config=my_callback.yaml", "--trainer.max_epochs=2")
    assert status == 0, err
    run = Run.find(logs / "digits")
    (saved,) = yaml.safe_load(run.config.read_text())["trainer"]["callbacks"]
    assert saved == {"class_path": "my_callback.BestSoFar", "init_args": {"metric": "val/accuracy"}}
    best = [pair[1] for pair in read_best(run)]
    assert best == sorted(best) and best[-1] > 0.1
    status, _, err = command("fit", "--resume", str(run.folder), "--trainer.max_epochs=3", "--model.optimizer.lr=0")
    assert status == 0, err
    values = [pair[0] for pair in read_best(run)]
    assert len(values) == 3
    for epoch, (_, best_so_far) in enumerate(read_best(run)):
        assert best_so_far == pytest.approx(max(values[: epoch + 1]), abs=1e-6)


def test_a_verb_reads_the_configuration_and_its_options(outside):
    status, out, err = outside("my_verbs.count_labels", "--least", "134")
    assert (status, out.split("\n")) == (0, ["1: 134", "3: 134", "5: 134", ""]), err
    assert outside("my_verbs.count_labels", "--least=3")[1].count("\n") == 10
    assert sum(int(line.split()[1]) for line in outside("my_verbs.count_labels")[1].splitlines()) == 1318
    _, out, _ = outside("my_verbs.count_labels", "--data.val_fraction=0.5")
    assert sum(int(line.split()[1]) for line in out.splitlines()) < 1000


def test_the_docstring_of_a_verb_is_its_help(outside, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = command("my_verbs.count_labels", "--help")
    assert status == 0, err
    assert out.startswith("usage: project [options] my_verbs.count_labels ")
    assert "Count the training images of each class" in out
    assert "--least LEAST" in out and "smallest count that is shown, 0 or more." in out and "default: 0" in out
    assert "--run RUN" in out and "--trainer.max_epochs" in out and "model.net" in out


def test_a_verb_of_a_run_gets_its_weights(outside, command, logs):
    assert outside("fit", *ONE_EPOCH)[0] == 0
    run = Run.find(logs / "digits")
    options = ["--parts", "[weight, bias]"]
    _, fresh, _ = outside("my_further_verbs.weigh", *options)
    outcomes = [
        command("my_further_verbs.weigh", *args, *options)
        for args in (["--run", str(logs / "digits")], [f"--config={run.config}", f"--ckpt_path={run.best_checkpoint}"])
    ]
    assert [outcome[0] for outcome in outcomes] == [0, 0], outcomes
    trained = [outcome[1].split() for outcome in outcomes]
    assert trained[0][1] == trained[1][1] != fresh.split()[1]
    assert "training False" in outcomes[0][1] and "training True" in fresh and "run None" in fresh
    assert run.folder.name in outcomes[0][1]
    assert [folder.name for folder in (logs / "digits").iterdir()] == ["version_0"]


def test_a_verb_runs_with_the_kernels_of_its_trainer(outside):
    build = pytest.importorskip("project.models.kernels.build")
    assert outside("my_further_verbs.see_kernels")[1] == f"kernels {build.library(torch.float32) is not None}\n"
    assert outside("my_further_verbs.see_kernels", "--trainer.kernels=off")[1] == "kernels False\n"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("my_verb.count_labels", ["No module named 'my_verb'", "did you mean my_verbs?"]),
        ("nowhere.count", ["correct nowhere.py, or run the command in its folder."]),
        ("my_verbs.count_label", ["my_verbs has no function count_label", "did you mean count_labels?"]),
        ("my_verbs.Classifier", ["my_verbs has no function Classifier"]),
        ("my_broken_verbs.count", ["invalid syntax", "line 1"]),
        ("my_importer.count", ["No module named 'my_lost_module'", "correct my_importer.py"]),
        ("my_further_verbs.of_the_net", ["its arguments are (model)", "begin with trainer, model, datamodule"]),
        ("my_further_verbs.untyped", ["least=0", "a type"]),
        ("my_further_verbs.any_options", ["**options"]),
        ("my_further_verbs.taken", ["another name than", "run"]),
        ("my_further_verbs.unknown_type", ["'Integer' is not defined"]),
        ("my_further_verbs.weigh", ["required", "parts"]),
    ],
)
def test_what_is_no_verb_is_refused_in_one_sentence(verb, words, outside):
    status, _, err = outside(verb)
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(("option", "words"), [("--leest=3", "'least'"), ("--least=few", "Expected a")])
def test_a_wrong_option_of_a_verb_is_refused_in_one_sentence(option, words, outside):
    status, _, err = outside("my_verbs.count_labels", option)
    assert status == 2 and err.count("\n") == 1 and words in err


def test_penalties_and_max_norm_may_be_any_module_of_the_net(outside, logs):
    options = ["--model.penalties=my_penalties.Orthogonal", "--model.penalties.strength=3.0"]
    bound = ["--model.max_norm=my_penalties.Clip", "--model.max_norm.bound=0.02"]
    status, _, err = outside("fit", *ONE_EPOCH, *options, *bound)
    assert status == 0, err
    weights = torch.load(Run.find(logs / "digits").last_checkpoint, weights_only=True)["state_dict"]
    largest = max(float(value.abs().max()) for key, value in weights.items() if key.endswith("conv.weight"))
    assert largest == pytest.approx(0.02, rel=1e-6)
    assert outside("fit", *ONE_EPOCH, *bound)[0] == 0
    without = torch.load(Run.find(logs / "digits").last_checkpoint, weights_only=True)["state_dict"]
    assert any(not torch.equal(weights[key], value) for key, value in without.items()), "the penalty changes nothing"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("penalties=torch.nn.CrossEntropyLoss", ["model.penalties is CrossEntropyLoss", "takes the net alone"]),
        ("penalties=my_penalties.PerLayer", ["it gives a tensor [", "not a scalar"]),
        ("penalties=torch.nn.Identity", ["it gives a SmallInception, not a scalar"]),
        ("max_norm=my_penalties.OfALayer", ["model.max_norm is OfALayer", "clamp_", "changes its weights in place"]),
    ],
)
def test_what_does_not_fit_the_net_is_named_in_one_sentence(option, words, outside, logs):
    status, _, err = outside("fit", f"--model.{option}")
    assert status == 2 and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not list(logs.glob("*/version_*"))
