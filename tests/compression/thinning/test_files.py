"""For each way in which units are coupled: the thinned net goes into an ONNX file, an int8 file and a packed file."""

from pathlib import Path

import pytest
from any_net_cells import judge
from helpers.coupled_nets import ROWS, SHAPE, make
from helpers.nets import choose
from torch import nn
from units_files import CHECKS, Thinned

from project.compression.thinning.units import units_of
from project.deployment.metadata import Metadata
from project.deployment.recipe import Recipe

FILES = ("onnx", "int8", "packed")
NOT_ONNX = {
    "a value that the net reads": "Could not guard on data-dependent expression",
    "unknown operation": "No decompositions registered",
}
"""Nets that PyTorch's exporter cannot write, also with all their units, and what it says."""


def half(net: nn.Module) -> dict[str, list[int]]:
    return choose(units_of(net, SHAPE), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_thinned_net_goes_into_all_files(name: str, tmp_path: Path) -> None:
    recipe = Recipe({"class_path": "helpers.coupled_nets.make", "init_args": {"name": name}})
    work = Thinned(recipe, lambda: make(name).eval(), half, SHAPE, tmp_path)
    work.metadata = Metadata(tuple("abcde"), SHAPE, (0.5,) * 3, (0.5,) * 3)
    assert set(FILES) < CHECKS.keys()
    cells = {check: judge(work, check) for check in FILES}
    reason = NOT_ONNX.get(name)
    for check in ("onnx", "int8") if reason else ():
        cell = cells.pop(check)
        assert cell.status == "refused" and str(reason) in cell.text
    assert {check: (cell.status, cell.text) for check, cell in cells.items() if cell.status != "works"} == {}
