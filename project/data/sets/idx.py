"""Reader of IDX files, plain or gzipped: the format of MNIST (http://yann.lecun.com/exdb/mnist/, "File formats").

A file holds two zero bytes, a type (8: unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
integer, and then the values.
"""

import hashlib
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_UNSIGNED_BYTE = 8
_MAX_DIMS = 4
_MAX_UNZIPPED = 1 << 31


def read_idx(path: Path) -> Tensor:
    """The array in an IDX file of unsigned bytes, as uint8.

    Raises:
        ValueError: if the file is not IDX, is truncated, is too long or is damaged.
    """
    return parse_idx(read_bytes(path), path)


def read_bytes(path: Path) -> bytearray:
    """The contents of a file, unzipped if it is gzip. The first bytes decide, not the name.

    A truncated gzip file gives the bytes up to its end. Of a gzip file that holds more bytes than its IDX header says,
    one byte more is unzipped, so that a small file cannot fill the memory.

    Raises:
        ValueError: if the gzip stream is damaged.
    """
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return bytearray(raw)
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        contents = stream.decompress(raw, 4 + 4 * _MAX_DIMS)
        if not stream.eof:
            contents += stream.decompress(stream.unconsumed_tail, _num_bytes_to_unzip(contents))
        if not stream.eof and len(contents) == _expected(contents):  # only the checksum is missing
            contents = contents[:-1]
        return bytearray(contents)
    except zlib.error as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and download it again.") from None


def _num_bytes_to_unzip(contents: bytes) -> int:
    """One more than the header says is left, at least one and at most 2 GB."""
    return min(max(1, _expected(contents) - len(contents) + 1), _MAX_UNZIPPED)


def _expected(contents: bytes | bytearray) -> int:
    """The number of bytes of an IDX file, by its header; 0 if that is none."""
    start = 4 + 4 * contents[3] if len(contents) > 3 else 0
    if not 4 < start <= min(len(contents), 4 + 4 * _MAX_DIMS):
        return 0
    return start + prod(struct.unpack(f">{contents[3]}I", contents[4:start]))


def parse_idx(contents: bytearray, path: Path) -> Tensor:
    """The array in the contents of the IDX file ``path``, as uint8.

    Raises:
        ValueError: if the contents are not IDX, are truncated or are too long.
    """
    if len(contents) < 4 or contents[:2] != b"\0\0" or contents[2] != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path} is not an IDX file of bytes (expected it to begin with 00 00 08, "
            f"found {contents[:4].hex(' ') or 'nothing'}): delete it and download it again."
        )
    num_dims = contents[3]
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(
            f"{path} has {num_dims} dimensions by its header, but images and labels have 1 to {_MAX_DIMS}: delete it "
            "and download it again."
        )
    start = 4 + 4 * num_dims
    shape = struct.unpack(f">{num_dims}I", contents[4:start]) if len(contents) >= start else ()
    expected = start + prod(shape) if shape else start
    if len(contents) != expected:
        fault = "truncated" if len(contents) < expected else "too long"
        raise ValueError(
            f"{path} is {fault}: expected {expected} bytes by its header, found {len(contents)} (unzipped): "
            "delete it and download it again."
        )
    values = torch.frombuffer(contents, dtype=torch.uint8)[start:] if expected > start else torch.empty(0).byte()
    return values.view(shape)


def md5(contents: bytes | bytearray) -> str:
    """The MD5 checksum, with which data sets are published. It detects damage; it does not protect against attacks."""
    return hashlib.md5(contents, usedforsecurity=False).hexdigest()
