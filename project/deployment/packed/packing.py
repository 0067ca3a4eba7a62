"""The packed file: a net's state dict in few bytes. It is read back to exactly the same bits.

Deep Compression (Han et al. 2016, arXiv:1510.00149): pruning, weight sharing (sec. 3), entropy coding (sec. 4). This is
the last step. It needs no information about the steps before: the values of each tensor decide how it is stored
(:mod:`project.deployment.packed.tensor_codes`), and all tensors go through one range coder
(:mod:`project.deployment.packed.bitstream`). The parts of a file are::

    magic  version  CRC-32 of all that follows  CRC-32 of the tensors  length of the header  header  range coder's bytes

The header is JSON, compressed by zlib; the caller chooses its content. Names, shapes and types of the tensors are not
in the file, because the net that is rebuilt from the header has them. A file of n bytes may hold at most
``2^24 + 4096 n`` values, so that a small file cannot ask for much memory, and take at most ``2^17 + n`` steps of a loop
(:mod:`project.deployment.packed.bitstream`), so that it cannot ask for much time.

A file says each thing in one way. What is read is written again, and other bytes than the file's are refused: a value
outside its range, an entry of a codebook that no weight has, a key that stands twice. Only what the writer chooses by
the number of bits (a model's setting, a codebook or none) is taken from the file, because another machine may round
these numbers in another way.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from project.deployment.packed.bitstream import Decoder, Encoder
from project.deployment.packed.tensor_codes import TYPES, code_group, groups_of

_FRAME = struct.Struct("<4sBIII")
_MAGIC, _VERSION = b"\x93NET", 1
_MAX_HEADER = 1 << 22
PACKAGE = "project"  # a word of the format: renaming leaves this line
"""What a header calls the package that reads it, whatever its name is."""
_DICTIONARY = (
    ",".join(map(str, range(4096))).encode()  # indices of channels
    + b'"surgeries":[{"type":"Thin","kept_out":{"kept_in":{"out_channels":{},"instance_norm","factorized":true,'
    b'"class_path":"@.models.GoogLeNet""class_path":"@.models.LeNet5""class_path":"@.models.'
    b'LeNet300100""@.models.NoNorm""torch.nn.Identity""torch.nn.init.xavier_uniform_""conv_activation":'
    b'"torch.nn.init.xavier_normal_""torch.nn.ReLU"[3,32,32],"mean":[0.5],"std":[0.5],[1,8,8]{"class_names":["0","1",'
    b'"2","3","4","5","6","7","8","9"],"image_shape":[1,28,28],"mean":[0.],"std":[0.],"recipe":{"net":{"class_path":'
    b'"@.models.SmallInception","init_args":{"num_classes":10,"image_shape":[1,28,28],"width":1.0,"stem":[32,64],'
    b'"stages":[[192],[384]],"pool_first":true,"norm":{"class_path":"@.models.BatchNorm","init_args":{"eps":1e-05,'
    b'"momentum":0.1,"affine":true,"track_running_stats":true,"device":null,"dtype":null,"bias":true}},"activation":'
    b'{"class_path":"@.models.ReLU"},"conv_dropout":0.0,"conv_dropout_type":{"class_path":"torch.nn.Dropout2d",'
    b'"init_args":{"inplace":false}},"fc_dropout":0.0,"weight_init":"torch.nn.init.kaiming_normal_"}},"surgeries":[]}}'
).replace(b"@", PACKAGE.encode())
"""Texts that are frequent in headers, for zlib. They are part of the format: a change needs another version."""


@dataclass(frozen=True)
class PackedTensors:
    """Sizes of one weight, or of all vectors of one name.

    Args:
        name: name of the weight in the state dict, or ``*.`` and the last part of the vectors' names.
        is_weight: whether it is one weight (two or more dimensions), and not vectors.
        num: number of values, zeros included.
        num_nonzero: number of values that are not zero.
        num_distinct: number of distinct values that are not zero.
        num_indexed: number of entries if each nonzero value is stored with its distance from the one before, in five
            bits (Han et al., sec. 2). Larger distances need filler entries, which are included.
        position_bits: number of bits in the file for the positions of the nonzero values.
        value_bits: number of bits in the file for the values.
        codebook_bits: number of bits in the file for the codebook and other settings.
    """

    name: str
    is_weight: bool
    num: int
    num_nonzero: int
    num_distinct: int
    num_indexed: int
    position_bits: float
    value_bits: float
    codebook_bits: float

    @property
    def bits(self) -> float:
        return self.position_bits + self.value_bits + self.codebook_bits


def pack(state_dict: Mapping[str, Tensor], header: Mapping[str, Any]) -> tuple[bytes, list[PackedTensors]]:
    """Make the content of a packed file.

    Args:
        state_dict: tensors of a net on the CPU, by name; floating point, integers or booleans.
        header: plain values that the reader gets back, as a dictionary that JSON can hold.

    Returns:
        The content, and the sizes of each weight and of all vectors of each name.

    Raises:
        ValueError: if the type of a tensor cannot be stored, or there are more values than so few bytes may hold.
    """
    for name, tensor in state_dict.items():
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name} holds {tensor.dtype}, which the packed format has no place for.")
    coder, rows = Encoder(), []
    for group in groups_of(state_dict):
        _write_group(coder, group, state_dict)
        rows.append(_row(group, state_dict, coder))
    text = _header_text({**header, "values": _count(state_dict)})
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_DICTIONARY)
    short = compressor.compress(text) + compressor.flush()
    rest = struct.pack("<II", _checksum(state_dict), len(short)) + short + coder.to_bytes()
    content = struct.pack("<4sBI", _MAGIC, _VERSION, zlib.crc32(rest)) + rest
    too_many = _count(state_dict) > max_values(len(content)) or coder.steps > max_steps(len(content))
    if len(text) > _MAX_HEADER or too_many:
        raise ValueError(
            f"the net's {_count(state_dict):,} values would take {len(content):,} bytes and its description "
            f"{len(text):,}, beyond what the packed format allows: choose another format."
        )
    return content, rows


class Packed:
    """The content of a packed file, opened to be read.

    The attribute ``header`` is checked only to be JSON. :meth:`unpack` reads the tensors.

    Args:
        content: all bytes of the file.

    Raises:
        ValueError: if the content is damaged, or no packed file.
    """

    def __init__(self, content: bytes) -> None:
        if len(content) < _FRAME.size or content[:4] != _MAGIC:
            raise ValueError("it does not begin as a packed file does")
        _, version, check, self._checksum, length = _FRAME.unpack_from(content)
        if version != _VERSION:
            raise ValueError(f"it is of version {version}, and this is version {_VERSION}")
        if zlib.crc32(content[9:]) != check:
            raise ValueError("its checksum is wrong")
        header, self._data = content[_FRAME.size : _FRAME.size + length], content[_FRAME.size + length :]
        if len(header) != length or len(self._data) % 4:
            raise ValueError("it is cut off")
        self.header = _read_header(header)
        self.max_values, self._max_steps = max_values(len(content)), max_steps(len(content))

    def unpack(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read the state dict.

        Args:
            like: tensors of the same names, shapes and types, on any device. On the meta device they take no memory.

        Raises:
            ValueError: if the file holds another number of values, more than its size allows, or damaged ones.
        """
        num = _count(like)
        if type(self.header.get("values")) is not int or num != self.header["values"]:
            raise ValueError(f"it holds {self.header.get('values')} values, but the net that it describes has {num}")
        if num > self.max_values:
            raise ValueError(f"it claims {num} values, which are too many for its size")
        coder, found = Decoder(self._data, self._max_steps), {}
        with np.errstate(all="ignore"):
            for group in groups_of(like):
                found.update(code_group(coder, None, group, like))
        state_dict = {name: found[name] for name in like}
        if not coder.exhausted or _checksum(state_dict) != self._checksum:
            raise ValueError("its weights do not match their checksum")
        again = Encoder(choices=coder.choices)
        for group in groups_of(state_dict):
            _write_group(again, group, state_dict)
        if again.to_bytes() != self._data:
            raise ValueError("its weights are not written as this format writes them")
        return state_dict


def max_values(num_bytes: int) -> int:
    """The largest number of values that a file of so many bytes may hold."""
    return (1 << 24) + 4096 * num_bytes


def max_steps(num_bytes: int) -> int:
    """The largest number of steps over the diagonals of flags that a file of so many bytes may take."""
    return (1 << 17) + num_bytes


def _write_group(coder: Encoder, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    coder.bits.clear()
    coder.part = "codebook"
    code_group(coder, {name: tensors[name] for name in names}, names, tensors)


def _header_text(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def _read_header(compressed: bytes) -> dict[str, Any]:
    """The header of a file. It stops after 4 MiB, so that a small file cannot fill the memory."""
    decompressor = zlib.decompressobj(-15, zdict=_DICTIONARY)
    try:
        text = decompressor.decompress(compressed, _MAX_HEADER)
        header = json.loads(text)
        known = isinstance(header, dict) and _header_text(header) == text
    except (zlib.error, ValueError, RecursionError):
        raise ValueError("its header is no text") from None
    if not decompressor.eof or decompressor.unused_data or not known:
        raise ValueError("its header is no description")
    return header


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of all tensors, in their order."""
    check = 0
    for tensor in tensors.values():
        check = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), check)
    return check


def _row(names: Sequence[str], tensors: Mapping[str, Tensor], coder: Encoder) -> PackedTensors:
    """The sizes of a group of tensors that ``coder`` has just written.

    A distance of d between two nonzero values takes ``(d - 1) // 32`` filler entries.
    """
    values = torch.cat([tensors[name].reshape(-1) for name in names])
    nonzero = values[values != 0]
    gaps = (values != 0).nonzero().flatten().diff(prepend=torch.tensor([-1]))
    is_weight = tensors[names[0]].dim() > 1
    return PackedTensors(
        name=names[0] if is_weight else f"*.{names[0].rpartition('.')[2]}",
        is_weight=is_weight,
        num=values.numel(),
        num_nonzero=nonzero.numel(),
        num_distinct=nonzero.unique().numel(),
        num_indexed=nonzero.numel() + int(((gaps - 1) // 32).sum()),
        position_bits=coder.bits["positions"],
        value_bits=coder.bits["values"],
        codebook_bits=coder.bits["codebook"],
    )
