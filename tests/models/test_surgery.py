"""Surgeries survive files as plain values, and come back by their class name."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import project.models.surgery as surgery_module
from project.models.surgery import from_plain, register_surgery, replay_, to_plain


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery_module, "_CLASSES", {})
    for cls in (Rename, Append):
        register_surgery(cls)


@dataclass(frozen=True)
class Rename:
    names: dict[str, list[int]]
    ratio: float = 0.5
    pair: tuple[int, bool | None] = (3, None)

    def apply_(self, net: nn.Module) -> None:
        raise ValueError("never fits")


@dataclass(frozen=True)
class Append:
    width: int

    def apply_(self, net: nn.Module) -> None:
        assert isinstance(net, nn.Sequential)
        net.append(nn.Linear(net[-1].out_features, self.width))


def test_plain_values_survive_a_file(tmp_path: Path) -> None:
    surgery = Rename({"a.b": [0, 2], "": []}, ratio=0.25, pair=(1, True))
    plain = to_plain(surgery)
    assert plain == {"type": "Rename", "names": {"a.b": [0, 2], "": []}, "ratio": 0.25, "pair": (1, True)}
    torch.save([plain], tmp_path / "surgeries.pt")
    (loaded,) = torch.load(tmp_path / "surgeries.pt", weights_only=True)
    assert from_plain(loaded) == surgery and loaded["type"] == "Rename", "the dictionary stays as it was"


def test_plain_values_are_a_copy() -> None:
    surgery = Rename({"a": [0]})
    to_plain(surgery)["names"]["a"].append(1)
    assert surgery.names == {"a": [0]}


@pytest.mark.parametrize("value", [np.float64(0.5), np.int64(1), torch.tensor(1.0), {1, 2}])
def test_values_that_are_not_plain_are_refused(value: object) -> None:
    with pytest.raises(AssertionError, match=r"Rename.ratio holds a \w+, not plain"):
        to_plain(Rename({}, ratio=value))
    with pytest.raises(AssertionError, match=r"Rename.names holds a \w+, not plain"):
        to_plain(Rename({"a": [value]}))


def test_replay_keeps_the_order() -> None:
    net = nn.Sequential(nn.Linear(2, 3))
    replay_(net, [to_plain(Append(5)), to_plain(Append(7))])
    assert [layer.weight.shape for layer in net] == [(3, 2), (5, 3), (7, 5)]


def test_unknown_types_and_fields_are_refused_before_anything_is_done() -> None:
    net = nn.Sequential(nn.Linear(2, 3))
    for wrong, message in [
        ({"type": "Thicken"}, r"'Thicken' is unknown \(known: Append, Rename\): import the module"),
        ({"width": 3}, "None is unknown"),
        ({"type": "Append", "size": 3}, r"Append has other fields than the saved \['size'\].*version"),
    ]:
        with pytest.raises(ValueError, match=message):
            replay_(net, [to_plain(Append(5)), wrong])
    assert len(net) == 1


def test_only_registered_dataclasses_under_one_name() -> None:
    @dataclass(frozen=True)
    class Stranger:
        def apply_(self, net: nn.Module) -> None: ...

    with pytest.raises(AssertionError, match="Stranger lacks @register_surgery"):
        to_plain(Stranger())
    with pytest.raises(AssertionError, match="int is no dataclass"):
        register_surgery(int)
    Stranger.__name__ = "Append"
    with pytest.raises(AssertionError, match="two classes Append"):
        register_surgery(Stranger)


def test_compression_does_not_import_lightning() -> None:
    folder = Path(surgery_module.__file__).parent
    assert [path.name for path in folder.glob("*.py") if "import lightning" in path.read_text("utf-8")] == []
    assert [path.name for path in folder.glob("*.py") if "from lightning" in path.read_text("utf-8")] == []
