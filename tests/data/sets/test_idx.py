"""IDX files: what was written is read, and every kind of damage is one sentence."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from project.data.sets.idx import read_idx


def idx(values: torch.Tensor) -> bytes:
    return struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 4, 3), (0, 2)], ids=str)
def test_round_trip(tmp_path: Path, shape: tuple[int, ...], zipped: bool) -> None:
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    assert torch.equal(read_idx(path), values)


GOOD = idx(torch.zeros(10, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (GOOD[:-30], "truncated: expected 176 bytes by its header, found 146"),
        (GOOD[:9], "truncated"),
        (GOOD + b"x", "too long: expected 176 bytes by its header, found 177"),
        (gzip.compress(GOOD, mtime=0)[:-12], "truncated"),
        (gzip.compress(GOOD, mtime=0)[:-8] + b"12345678", "damaged"),
        (b"\x1f\x8bnonsense", "damaged"),
        (b"<html>", "not an IDX file"),
        (b"\0\0\x0d\x01" + GOOD[4:], "not an IDX file"),
        (b"", "not an IDX file"),
        (b"\0\0\x08\0", "has 0 dimensions"),
        (b"\0\0\x08\xff" + bytes(4 * 255), "has 255 dimensions"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "truncated"),
        (gzip.compress(b"\0\0\x08\x04" + b"\xff" * 16, mtime=0), "truncated"),
        (gzip.compress(b"\0\0\x08\xff" + bytes(5000), mtime=0), "has 255 dimensions"),
        (gzip.compress(GOOD, mtime=0)[:-8], "truncated"),
        (gzip.compress(GOOD + b"x", mtime=0), "too long"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, contents: bytes, words: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=words) as error:
        read_idx(path)
    assert str(path) in str(error.value) and "delete it and download it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(GOOD + bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="too long"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
