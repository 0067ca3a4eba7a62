"""The nets have their former names: those of classes in ``project.models``, and those of modules."""

import subprocess
import sys
from importlib import import_module

import pytest
import yaml

from project import models
from project.frame.cli import CLI

MODULES = {
    "googlenet": ("GoogLeNet", "BNGoogLeNet"),
    "inception_v3": ("InceptionV3",),
    "inception_v3_blocks": ("AsymmetricInception", "ExpandedInception", "FactorizedInception", "GridReduction"),
    "lenet": ("LeNet5", "LeNet300100"),
}


@pytest.mark.parametrize("module", MODULES)
def test_each_class_has_its_names(module: str) -> None:
    former, present = import_module(f"project.models.{module}"), import_module(f"project.models.zoo.{module}")
    assert former is present
    for name in MODULES[module]:
        assert getattr(models, name) is getattr(present, name) and name in models.__all__


@pytest.mark.parametrize("path", ["project.models.LeNet300100", "project.models.lenet.LeNet300100", "LeNet300100"])
def test_a_configuration_may_have_each_name(path: str, tmp_path) -> None:
    net = {"class_path": path, "init_args": {"fc_dropout": 0.25}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": "project.data.Digits", "model": {"net": net}}))
    cli = CLI([f"--config={tmp_path / 'config.yaml'}"], run=False)
    assert type(cli.model.net) is models.LeNet300100 and cli.model.net.dropout1.p == 0.25


@pytest.mark.slow
def test_a_new_process_knows_the_names_without_a_module() -> None:
    """jsonargparse finds a class by its name alone if it is loaded."""
    code = (
        "from project.frame.cli import CLI; cli = CLI(['fit', '--data=MNIST', '--model.net=LeNet5', '--print_config'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "class_path: project.models.LeNet5" in done.stdout and "project.data.MNIST" in done.stdout
