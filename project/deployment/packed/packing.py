"""The packed file: a net's state dict in few bytes, read back to the same bits.

Deep Compression (Han et al. 2016, arXiv:1510.00149): pruning, weight sharing (sec. 3), entropy coding (sec. 4). This is
the last step, and it asks nobody what the others did: each tensor is looked at alone
(:mod:`project.deployment.packed.tensor_codes`) and all go through one range coder
(:mod:`project.deployment.packed.bitstream`).

::

    magic  version  CRC-32 of all that follows  CRC-32 of the tensors  length of the header  header  range coder's bytes

The header is JSON (compressed by zlib) that the caller gives and takes; names, shapes and types of the tensors are not
in the file, since the net that is rebuilt from the header has them. A file of n bytes may stand for at most
``2^24 + 4096 n`` values, so that no small one asks for much memory.
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
"""What headers are like; part of the format, so a change needs another version."""


@dataclass(frozen=True)
class PackedTensors:
    """What became of one weight, or of all vectors of one name.

    Args:
        name: of the tensor in the state dict; of vectors, the last part of their names.
        is_weight: and no vectors.
        num: values.
        num_nonzero: that are not zero.
        num_distinct: distinct values that are not zero.
        num_indexed: entries of a list of these values, each five bits after the one before, fillers included.
        position_bits, value_bits, codebook_bits: of the file.
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
    """A file's content, and what its bits are spent on.

    Args:
        state_dict: of a net on the processor; floating point, integers or booleans.
        header: plain values.

    Raises:
        ValueError: for a tensor of another type, or more values than so few bytes may stand for.
    """
    for name, tensor in state_dict.items():
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name} holds {tensor.dtype}, which the packed format has no place for.")
    coder, rows = Encoder(), []
    for group in groups_of(state_dict):
        coder.bits.clear()
        coder.part = "codebook"
        code_group(coder, {name: state_dict[name] for name in group}, group, state_dict)
        rows.append(_row(group, state_dict, coder))
    text = json.dumps({**header, "values": _count(state_dict)}, ensure_ascii=False, separators=(",", ":")).encode()
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_DICTIONARY)
    short = compressor.compress(text) + compressor.flush()
    rest = struct.pack("<II", _checksum(state_dict), len(short)) + short + coder.to_bytes()
    content = struct.pack("<4sBI", _MAGIC, _VERSION, zlib.crc32(rest)) + rest
    if len(text) > _MAX_HEADER or _count(state_dict) > max_values(len(content)):
        raise ValueError(
            f"the net's {_count(state_dict):,} values would take {len(content):,} bytes and its description "
            f"{len(text):,}, beyond what the packed format allows: choose another format."
        )
    return content, rows


class Packed:
    """A file's content, opened: ``header`` is checked to be JSON and no more, ``unpack`` reads the tensors.

    Raises:
        ValueError: when it is damaged, or no packed file.
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
        self.max_values = max_values(len(content))

    def unpack(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict.

        Args:
            like: tensors of the same names, shapes and types, on any device (meta, so that they take no memory).

        Raises:
            ValueError: when those of the file are others, or too many for it.
        """
        num = _count(like)
        if num != self.header.get("values"):
            raise ValueError(f"it holds {self.header.get('values')} values, but the net that it describes has {num}")
        if num > self.max_values:
            raise ValueError(f"it claims {num} values, which are too many for its size")
        coder, found = Decoder(self._data), {}
        with np.errstate(all="ignore"):
            for group in groups_of(like):
                found.update(code_group(coder, None, group, like))
        state_dict = {name: found[name] for name in like}
        if not coder.exhausted or _checksum(state_dict) != self._checksum:
            raise ValueError("its weights do not match their checksum")
        return state_dict


def max_values(num_bytes: int) -> int:
    return (1 << 24) + 4096 * num_bytes


def _read_header(compressed: bytes) -> dict[str, Any]:
    decompressor = zlib.decompressobj(-15, zdict=_DICTIONARY)
    try:
        text = decompressor.decompress(compressed, _MAX_HEADER)
        header = json.loads(text)
    except (zlib.error, ValueError, RecursionError):
        raise ValueError("its header is no text") from None
    if not decompressor.eof or decompressor.unused_data or not isinstance(header, dict):
        raise ValueError("its header is no description")
    return header


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    check = 0
    for tensor in tensors.values():
        check = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), check)
    return check


def _row(names: Sequence[str], tensors: Mapping[str, Tensor], coder: Encoder) -> PackedTensors:
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
