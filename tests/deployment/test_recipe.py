"""Nets from plain values: the same structure as from Python, and no code that the reader did not choose."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from project import models
from project.compression import to_plain
from project.compression.thinning.thin import Thin
from project.deployment.recipe import Recipe, UntrustedError
from project.models import BatchNorm, SmallInception

NET = {"class_path": "project.models.SmallInception", "init_args": {"num_classes": 5, "image_shape": [1, 8, 8]}}
LENET = {"class_path": "project.models.LeNet300100", "init_args": {"num_classes": 5, "image_shape": [1, 8, 8]}}


def shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


def test_arguments_are_objects_and_factories_as_in_a_configuration() -> None:
    norm = {"class_path": "project.models.BatchNorm", "init_args": {"eps": 0.5, "device": None}}
    arguments = {
        "num_classes": 7, "image_shape": [1, 28, 28], "width": 0.25, "norm": norm, "activation": "torch.nn.SiLU",
        "conv_dropout": 0.5, "conv_dropout_type": {"class_path": "torch.nn.Dropout2d", "init_args": {"inplace": False}},
        "weight_init": "torch.nn.init.xavier_normal_",
    }  # fmt: skip
    state = torch.get_rng_state()
    net = Recipe({"class_path": "project.models.SmallInception", "init_args": arguments}).build()
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(net, SmallInception) and not net.training and net.weight_init is nn.init.xavier_normal_
    norms = [module for module in net.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 16 and all(module.eps == 0.5 for module in norms)
    assert any(isinstance(module, nn.Dropout2d) for module in net.modules())
    assert any(isinstance(module, nn.SiLU) for module in net.modules())
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert shapes(net) == shapes(SmallInception(7, (1, 28, 28), width=0.25))


def test_surgeries_are_replayed() -> None:
    thin = Thin({"fc1": list(range(0, 300, 3))}, {"fc2": list(range(0, 300, 3))})
    expected = models.LeNet300100(5, (1, 8, 8))
    thin.apply_(expected)
    assert shapes(Recipe(LENET, [to_plain(thin)]).build()) == shapes(expected)


@pytest.mark.parametrize(
    "path", ["os.system", "builtins.eval", "subprocess.Popen", "torch.load", "torch.nn.Linear.load", "torch.nn.init._x",
             "project.models.Classifier", "project.deployment.recipe.importlib", "project.deployment.export.export",
             "nowhere", "", "."],
)  # fmt: skip
def test_other_code_is_neither_imported_nor_called(path: str) -> None:
    before = set(sys.modules)
    for net in (
        {"class_path": path, "init_args": {}},
        {**NET, "init_args": {**NET["init_args"], "weight_init": path}},
        {**NET, "init_args": {**NET["init_args"], "norm": {"class_path": path, "init_args": {"command": "true"}}}},
    ):
        with pytest.raises(UntrustedError, match="--trust"):
            Recipe(net).build(trust=["", "o"])
    assert set(sys.modules) == before


def test_a_trusted_package_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, num_classes, layer: nn.Module):\n"
        "        super().__init__(4, num_classes)\n"
        "        self.layer = layer\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    layer = {"class_path": "torch.nn.PReLU", "init_args": {"num_parameters": 3}}
    recipe = Recipe({"class_path": "my_nets.Net", "init_args": {"num_classes": 2, "layer": layer}})
    assert set(recipe.modules) == {"my_nets", "torch.nn"}
    with pytest.raises(UntrustedError, match="--trust my_nets"):
        recipe.build()
    with pytest.raises(UntrustedError, match="--trust my_nets"):
        recipe.build(trust=["my"])
    assert "my_nets" not in sys.modules
    assert list(shapes(recipe.build(trust=["my_nets"]))) == ["weight", "bias", "layer.weight"]
    with pytest.raises(ValueError, match=r"there is no my_nets\.Other"):
        Recipe({"class_path": "my_nets.Other"}).build(trust=["my_nets"])


@pytest.mark.parametrize(
    "net",
    [
        {**LENET, "init_args": {"num_classes": 10**12, "image_shape": [10**6, 10**6, 10**6]}},
        {**LENET, "init_args": {**LENET["init_args"], "num_classes": 10**400}},
        {"class_path": "torch.nn.LayerNorm", "init_args": {"normalized_shape": [10**12], "device": "cpu"}},
        {**NET, "init_args": {**NET["init_args"], "stem": [8] * 10**5}},
        {**NET, "init_args": {**NET["init_args"], "width": 1e300}},
    ],
)
def test_a_huge_net_takes_no_memory(net: dict) -> None:
    """Refused, or built of tensors that are not there."""
    try:
        built = Recipe(json.loads(json.dumps(net))).build()
    except (ValueError, RuntimeError, OverflowError, TypeError):
        return
    assert all(tensor.is_meta for tensor in built.state_dict().values())
