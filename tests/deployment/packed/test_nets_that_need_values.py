"""Nets whose constructor or forward pass needs the values of tensors, which the meta device does not have."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import odd_nets
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

from project.deployment.metadata import Metadata
from project.deployment.model_file import ModelFile
from project.deployment.packed import file as packed_file
from project.deployment.packed.bounds import Bounds
from project.deployment.packed.file import write_packed
from project.deployment.recipe import Recipe

METADATA = Metadata(tuple("0123456789"), (3, 16, 16), (0.5,) * 3, (0.5,) * 3)


class SmallRegNet(RegNet):
    """torchvision's own constructor, with few parameters."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            BlockParams.from_init_params(depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8), num_classes=num_classes
        )


def written(net: nn.Module, path: Path, **arguments: Any) -> Path:
    recipe = Recipe({"class_path": f"{type(net).__module__}.{type(net).__name__}", "init_args": arguments})
    write_packed(net, METADATA, recipe, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    "net", ["ComputedWidth", "HiddenBuffer", "PlainTensor", "WeightNorm", "SpectralNorm", "RegNet"]
)
def test_the_file_is_the_net(net: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = (SmallRegNet if net == "RegNet" else getattr(odd_nets, net))().eval()
    images = torch.randn(4, 3, 16, 16)
    state = torch.get_rng_state()
    read = ModelFile(written(made, tmp_path / "m.packed"), trust=[type(made).__module__])
    assert torch.equal(torch.get_rng_state(), state)
    expected = made(images)
    assert (read.logits(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_trust_nothing_is_built_with_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(odd_nets.ComputedWidth(), tmp_path / "m.packed")
    monkeypatch.setattr(Recipe, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed_file.open_packed(path)
    devices: list[str] = []

    def build(recipe: Recipe, trust: object, device: str) -> nn.Module:
        devices.append(device)
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(Recipe, "build", build)
    for trust in ([], ["helpers"]):
        with pytest.raises(RuntimeError, match="meta"):
            packed_file.open_packed(path, trust)
    assert devices == ["meta", "meta", "cpu"]


@pytest.mark.parametrize(("size", "times"), [(1 << 40, 1), (1 << 34, 1), (1 << 22, 64), (1 << 10, 1 << 20)])
def test_a_constructor_that_asks_for_much_memory_is_refused(size: int, times: int, tmp_path: Path) -> None:
    """In one tensor or in many; what is refused is not allocated."""
    path = written(odd_nets.Greedy(8), tmp_path / "m.packed", size=size, times=times)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"m\.packed.*(more than \d+ values|more values while it is built)"):
        ModelFile(path, trust=["helpers"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_real_operations_are_checked_before_they_run() -> None:
    x = torch.zeros(1 << 10)
    with Bounds(1 << 20, 1 << 21) as bounds:
        assert (x + 1).sum().item() == 1 << 10
        assert x.nonzero().shape == (0, 1) and torch.arange(3).tolist() == [0, 1, 2]
        x.add_(1)
        x.view(32, 32)
        assert (1 << 10) < bounds.total < (1 << 12)  # changes in place and views are nothing new
        with pytest.raises(ValueError, match="a tensor of more than"):
            torch.zeros(1 << 40)
        with pytest.raises(ValueError, match="a tensor of more than"):
            x.view(-1, 1) * x.view(1, -1).repeat(1, 2)
        with pytest.raises(ValueError, match="more values while it is built"):
            for _ in range(4):
                torch.zeros(1 << 20)
