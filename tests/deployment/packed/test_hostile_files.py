"""Packed files whose checksums are right and whose content is not what the writer would have written."""

import copy
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.nets import recipe_of
from torch import nn

from project.deployment.metadata import Metadata
from project.deployment.model_file import ModelFile
from project.deployment.packed import bounds, packing
from project.deployment.packed.bitstream import Decoder, Encoder, code_flags, code_number, code_symbols
from project.deployment.packed.bounds import Bounds
from project.deployment.packed.file import write_packed
from project.deployment.packed.packing import Packed, pack
from project.deployment.recipe import Recipe

METADATA = Metadata(("a", "b", "c", "d", "e"), (1, 9, 5), (0.3,), (0.4,))


def framed(text: bytes, data: bytes, check: int) -> bytes:
    """A packed file with right checksums."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=packing._DICTIONARY)
    header = compressor.compress(text) + compressor.flush()
    rest = struct.pack("<II", check, len(header)) + header + data
    return b"\x93NET\x01" + struct.pack("<I", zlib.crc32(rest)) + rest


def file_of(coder: Encoder, tensor: torch.Tensor) -> Packed:
    return Packed(framed(b'{"values":%d}' % tensor.numel(), coder.to_bytes(), packing._checksum({"w": tensor})))


def test_a_value_outside_its_type_is_refused() -> None:
    content, _ = pack({"w": torch.tensor([300, 3, 4], dtype=torch.int16)}, {})
    with pytest.raises(ValueError, match="outside the range from -128 to 127"):
        Packed(content).unpack({"w": torch.zeros(3, dtype=torch.int8)})


@pytest.mark.parametrize("span", [3, 7])
def test_a_range_that_no_value_reaches_is_refused(span: int) -> None:
    """The values 0 to 3, with the right span of 3 (the control) and with another."""
    values = np.array([0, 1, 2, 3, 3, 3])
    coder = Encoder()
    coder.uniform(2, 1, np.array([0]))  # not sparse
    coder.uniform(2, 1, np.array([0]))  # as they are
    code_number(coder, 0)
    code_number(coder, span)
    code_symbols(coder, span + 1, len(values), values)
    tensor = torch.from_numpy(values).to(torch.int32)
    if span == 3:
        assert torch.equal(file_of(coder, tensor).unpack({"w": tensor})["w"], tensor)
    else:
        with pytest.raises(ValueError, match="not written as this format writes them"):
            file_of(coder, tensor).unpack({"w": tensor})


def test_a_key_that_stands_twice_is_refused() -> None:
    state = {"w": torch.ones(3)}
    content, _ = pack(state, {"a": 1})
    check, data = packing._checksum(state), Packed(content)._data
    assert Packed(framed(b'{"a":1,"values":3}', data, check)).header == {"a": 1, "values": 3}
    for text in (b'{"a":2,"a":1,"values":3}', b'{"a": 1,"values":3}', b'{"a":1.0e0,"values":3}', b'["values"]'):
        with pytest.raises(ValueError, match="its header is no description"):
            Packed(framed(text, data, check))
    with pytest.raises(ValueError, match="holds True values"):
        Packed(framed(b'{"values":true}', data, check)).unpack({"w": torch.ones(1)})


def test_the_steps_of_a_file_are_bounded_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (torch.rand(40, 30, 9, generator=torch.Generator().manual_seed(0)) < torch.rand(40, 1, 1)).long().numpy()
    coder = Encoder()
    code_flags(coder, flags.shape, flags)
    assert coder.steps == 270
    assert np.array_equal(code_flags(Decoder(coder.to_bytes(), max_steps=270), flags.shape), flags)
    with pytest.raises(ValueError, match="more time to read"):
        code_flags(Decoder(coder.to_bytes(), max_steps=269), flags.shape)
    monkeypatch.setattr(packing, "max_steps", lambda num_bytes: 269)
    with pytest.raises(ValueError, match="beyond what the packed format allows"):
        pack({"w": torch.from_numpy(flags).float()}, {})


def opened(net: dict[str, Any], folder: Path, **header: Any) -> str:
    """The error for a file that describes a net with other weights than it has."""
    plain = {"class_names": ["a", "b"], "image_shape": [1, 8, 8], "mean": [0.3], "std": [0.4]}
    plain |= {"recipe": {"net": net, "surgeries": []}, "values": 7, **header}
    content = framed(json.dumps(plain, separators=(",", ":")).encode(), b"", 0)
    (folder / "x.packed").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.packed") as error:
        ModelFile(folder / "x.packed")
    assert "\n" not in str(error.value)
    return str(error.value)


INCEPTION = "project.models.SmallInception"


def test_a_net_of_much_memory_or_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"num_classes": 2, "image_shape": [1, 8, 8]}
    wide = {"class_path": INCEPTION, "init_args": {**arguments, "width": 1000.0}}
    assert "a tensor of more than" in opened(wide, tmp_path)
    monkeypatch.setattr(bounds, "_MAX_OPERATIONS", 20)
    assert "more operations" in opened({"class_path": INCEPTION, "init_args": arguments}, tmp_path)


def test_products_are_counted() -> None:
    a = torch.empty(1 << 13, 1 << 14, device="meta")
    with Bounds(1 << 30):
        a @ a.T
        with pytest.raises(ValueError, match="more operations"):
            a @ a.T


@pytest.mark.parametrize(
    "header",
    [
        *(
            {"image_shape": shape}
            for shape in ([1, 8], [1, 8, 0], [1, 8, True], [1, 8, 8.0], "188", [1, 1 << 16, 1 << 16])
        ),
        *({"std": std} for std in ([0], [0.4, 0.4], [1e-320], ["0.4"], [True], 0.4)),
        *({"mean": mean} for mean in ([10**30], [None], [[0.3]])),
        *({"class_names": names} for names in ([], "ab", ["a", 3], {"a": 1, "b": 2})),
        {"more": 1},
    ],
    ids=str,
)
def test_a_header_outside_its_range_is_refused(header: dict[str, Any], tmp_path: Path) -> None:
    net = {"class_path": "project.models.LeNet300100", "init_args": {"num_classes": 2, "image_shape": [1, 8, 8]}}
    assert "its header lacks" in opened(net, tmp_path, **header)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("LeNet300100-9x5")
    for width in (0, 2):  # 2 is the control
        net = nn.Sequential(nn.Flatten(), nn.Linear(45, width), nn.Linear(width, 5))
        write_packed(net, METADATA, recipe, tmp_path / "m.packed")
        monkeypatch.setattr(
            Recipe, "build", lambda recipe, trust, device, net=net: copy.deepcopy(net).to("meta").eval()
        )
        if width:
            assert ModelFile(tmp_path / "m.packed").metadata == METADATA
        else:
            with pytest.raises(ValueError, match="a layer without weights"):
                ModelFile(tmp_path / "m.packed")
