"""The packed file: a net's state dict in few bytes, read back to the same bits.

Deep Compression (Han et al. 2016, arXiv:1510.00149): pruning, weight sharing (sec. 3), entropy coding (sec. 4). This is
the last step, and it asks nobody what the others did: each tensor is looked at alone. Its values become integers, the
multiples of a power of two where twelve bits hold them, else the narrowest floating point format that is exact, in the
order of the numbers; its zeros become a map of positions, few distinct values a codebook; and what is left goes
through :mod:`project.compression.bitstream`. Vectors of one name (all scales, all shifts …) are coded as one.

::

    magic  version  CRC-32 of all that follows  CRC-32 of the tensors  length of the header  header  range coder's bytes

The header is JSON (compressed by zlib) that the caller gives and takes; names, shapes and types of the tensors are not
in the file, since the net that is rebuilt from the header has them. A file of n bytes may stand for at most
``2^24 + 4096 n`` values, so that no small one asks for much memory.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from project.compression.bitstream import (
    MAX_ALPHABET,
    Array,
    Coder,
    Decoder,
    Encoder,
    code_flags,
    code_integers,
    code_number,
    code_symbols,
)

_FRAME = struct.Struct("<4sBIII")
_MAGIC, _VERSION = b"\x93NET", 1
_MAX_HEADER = 1 << 22
_DICTIONARY = (
    ",".join(map(str, range(4096))).encode()  # indices of channels
    + b'"surgeries":[{"type":"Thin","kept_out":{"kept_in":{"out_channels":{},"instance_norm","factorized":true,'
    b'"class_path":"project.models.GoogLeNet""class_path":"project.models.LeNet5""class_path":"project.models.'
    b'LeNet300100""project.models.NoNorm""torch.nn.Identity""torch.nn.init.xavier_uniform_""conv_activation":'
    b'"torch.nn.init.xavier_normal_""torch.nn.ReLU"[3,32,32],"mean":[0.5],"std":[0.5],[1,8,8]{"class_names":["0","1",'
    b'"2","3","4","5","6","7","8","9"],"image_shape":[1,28,28],"mean":[0.],"std":[0.],"recipe":{"net":{"class_path":'
    b'"project.models.SmallInception","init_args":{"num_classes":10,"image_shape":[1,28,28],"width":1.0,"stem":[32,64],'
    b'"stages":[[192],[384]],"pool_first":true,"norm":{"class_path":"project.models.BatchNorm","init_args":{"eps":1e-05,'
    b'"momentum":0.1,"affine":true,"track_running_stats":true,"device":null,"dtype":null,"bias":true}},"activation":'
    b'{"class_path":"project.models.ReLU"},"conv_dropout":0.0,"conv_dropout_type":{"class_path":"torch.nn.Dropout2d",'
    b'"init_args":{"inplace":false}},"fc_dropout":0.0,"weight_init":"torch.nn.init.kaiming_normal_"}},"surgeries":[]}}'
)
"""What headers are like; part of the format, so a change needs another version."""
_FIXED_BITS = 12
_KINDS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (torch.float16, torch.bfloat16, torch.float32),
    torch.float16: (torch.float16,),
    torch.bfloat16: (torch.bfloat16,),
    torch.float64: (torch.float64,),
}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TYPES = (*_KINDS, *_INTEGERS.values(), torch.uint8, torch.bool)


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
        if tensor.dtype not in _TYPES:
            raise ValueError(f"{name} holds {tensor.dtype}, which the packed format has no place for.")
    coder, rows = Encoder(), []
    for group in _groups(state_dict):
        coder.bits.clear()
        coder.part = "codebook"
        _code_group(coder, {name: state_dict[name] for name in group}, group, state_dict)
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
            for group in _groups(like):
                found.update(_code_group(coder, None, group, like))
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


def _groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Each weight for itself; vectors and scalars by the last part of their names, whose values are alike."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        key = (name,) if tensor.dim() > 1 else (name.rpartition(".")[2], tensor.dtype, "")
        groups.setdefault(key, []).append(name)
    return list(groups.values())


# -- one group of tensors ---------------------------------------------------------------------------------------------


def _code_group(
    coder: Coder, tensors: Mapping[str, Tensor] | None, names: Sequence[str], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those that are fixed point as one array of integers, and the others as another; returns them either way."""
    dtype = like[names[0]].dtype
    if dtype not in _KINDS:
        given = None if tensors is None else [_integers(tensors[name]) for name in names]
        return {
            name: torch.from_numpy(part).to(dtype).reshape(like[name].shape)
            for name, part in _code_arrays(coder, names, like, given)
        }
    fixed = None if tensors is None else {name: _to_fixed(tensors[name]) for name in names}
    is_fixed = None if fixed is None else np.array([fixed[name] is not None for name in names], np.int64)
    is_fixed = code_symbols(coder, 2, len(names), is_fixed)
    found = {}
    points = [name for name, flag in zip(names, is_fixed, strict=True) if flag]
    if points:
        pairs = None if fixed is None else [_known(fixed[name]) for name in points]
        exponents = None if pairs is None else np.array([exponent for exponent, _ in pairs], np.int64)
        exponents = code_integers(coder, len(points), exponents)
        given = None if pairs is None else [integers for _, integers in pairs]
        for (name, part), exponent in zip(_code_arrays(coder, points, like, given), exponents, strict=True):
            found[name] = _from_fixed(part, int(exponent), dtype).reshape(like[name].shape)
    floats = [name for name, flag in zip(names, is_fixed, strict=True) if not flag]
    if floats:
        values = None if tensors is None else [tensors[name] for name in floats]
        kind = _code_kind(coder, dtype, values)
        given = None if values is None else [_ordered(value.to(kind)) for value in values]
        for name, part in _code_arrays(coder, floats, like, given):
            found[name] = _from_ordered(part, kind).to(dtype).reshape(like[name].shape)
    return found


def _code_kind(coder: Coder, dtype: torch.dtype, values: Sequence[Tensor] | None) -> torch.dtype:
    """The narrowest exact format; of two of one width the one that spreads the numbers less."""
    kinds = _KINDS[dtype]
    if values is None:
        return kinds[int(coder.uniform(len(kinds), 1, None)[0])]
    exact = [
        kind for kind in kinds if all(torch.equal(_bits(value.to(kind).to(dtype)), _bits(value)) for value in values)
    ]
    spans = {}
    for kind in exact:
        ordered = [_ordered(value.to(kind)) for value in values if value.numel()]
        spans[kind] = max((int(o.max()) for o in ordered), default=0) - min((int(o.min()) for o in ordered), default=0)
    kind = min(exact, key=lambda kind: spans[kind])
    coder.uniform(len(kinds), 1, np.array([kinds.index(kind)]))
    return kind


def _code_arrays(
    coder: Coder, names: Sequence[str], like: Mapping[str, Tensor], given: Sequence[Array] | None
) -> Iterator[tuple[str, Array]]:
    """Integers of several tensors as one array."""
    sizes = [like[name].numel() for name in names]
    shape = like[names[0]].shape
    rows, columns = (shape[0], shape[1]) if len(shape) > 1 else (sum(sizes), 1)
    places = sum(sizes) // max(1, rows * columns)
    values = None if given is None else np.concatenate(given)
    found = _code_array(coder, (rows, columns, places), values)
    yield from zip(names, np.split(found, np.cumsum(sizes)[:-1]), strict=True)


def _code_array(coder: Coder, shape: tuple[int, int, int], values: Array | None) -> Array:
    """Zeros apart where they are many; the others as numbers of a codebook or as they are."""
    num = math.prod(shape)
    if not num:
        return np.zeros(0, np.int64)
    sparse = None if values is None else np.array([4 * np.count_nonzero(values == 0) > num], np.int64)
    if not coder.uniform(2, 1, sparse)[0]:
        return _code_values(coder, num, values)
    coder.part = "positions"
    flags = code_flags(coder, shape, None if values is None else (values.reshape(shape) != 0).astype(np.int64))
    kept = flags.reshape(-1) != 0
    found = np.zeros(num, np.int64)
    if kept.any():
        found[kept] = _code_values(coder, int(kept.sum()), None if values is None else values[kept])
    return found


def _code_values(coder: Coder, num: int, values: Array | None) -> Array:
    distinct = None if values is None else np.unique(values)
    if distinct is not None and len(distinct) > min(MAX_ALPHABET, num // 2 + 1):
        layout = 0
        coder.uniform(2, 1, np.array([0]))
    else:
        layout = coder.choose(2, lambda trial, option: _code_layout(trial, option, num, values, distinct))
    return _code_layout(coder, layout, num, values, distinct)


def _code_layout(coder: Coder, layout: int, num: int, values: Array | None, distinct: Array | None) -> Array:
    """As they are (0), or as numbers of a codebook (1)."""
    if layout == 0:
        coder.part = "values"
        return code_integers(coder, num, values)
    coder.part = "codebook"
    codebook = _code_codebook(coder, distinct)
    coder.part = "values"
    symbols = None if values is None else np.searchsorted(codebook, values)
    return codebook[code_symbols(coder, len(codebook), num, symbols)]


def _code_codebook(coder: Coder, distinct: Array | None) -> Array:
    """Integers that rise: the first, then the steps."""
    steps = None if distinct is None else np.diff(distinct, prepend=0)
    num = code_number(coder, None if steps is None else len(steps))
    if not 0 < num <= MAX_ALPHABET:
        raise ValueError(f"a codebook of {num} values")
    first = code_integers(coder, 1, None if steps is None else steps[:1])
    rest = code_integers(coder, num - 1, None if steps is None else steps[1:])
    return np.cumsum(np.concatenate([first, rest]))


# -- values as integers -----------------------------------------------------------------------------------------------


def _integers(tensor: Tensor) -> Array:
    return tensor.reshape(-1).to(torch.int64).numpy()


def _bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers: minus zero and each NaN are values like others."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _ordered(tensor: Tensor) -> Array:
    """Floating point numbers as integers in the same order; +0 is 0, -0 is -1."""
    bits = _bits(tensor).reshape(-1).to(torch.int64).numpy()
    return np.where(bits < 0, ~(bits & _largest(tensor.dtype)), bits)


def _from_ordered(integers: Array, kind: torch.dtype) -> Tensor:
    largest = _largest(kind)
    bits = np.where(integers < 0, ~integers + (-largest - 1), integers)
    return torch.from_numpy(bits).to(_INTEGERS[kind.itemsize]).view(kind)


def _largest(kind: torch.dtype) -> int:
    return torch.iinfo(_INTEGERS[kind.itemsize]).max


def _to_fixed(tensor: Tensor) -> tuple[int, Array] | None:
    """(exponent, integers) with ``tensor = integers * 2^exponent``, where few bits hold the integers."""
    x = tensor.reshape(-1).to(torch.float64).numpy()
    nonzero = x[x != 0]
    if not np.isfinite(x).all() or np.signbit(x[x == 0]).any():
        return None
    if not len(nonzero):
        return 0, np.zeros(len(x), np.int64)
    mantissas, exponents = np.frexp(nonzero)
    lowest = (mantissas * 2.0**53).astype(np.int64)
    exponent = int((exponents - 54 + np.frexp((lowest & -lowest).astype(np.float64))[1]).min())
    if exponents.max() - exponent > _FIXED_BITS:
        return None
    return exponent, np.ldexp(x, -exponent).astype(np.int64)


def _from_fixed(integers: Array, exponent: int, dtype: torch.dtype) -> Tensor:
    if abs(exponent) > 1100:
        raise ValueError(f"an exponent of {exponent}")
    return torch.from_numpy(np.ldexp(integers.astype(np.float64), exponent)).to(dtype)


def _known(pair: tuple[int, Array] | None) -> tuple[int, Array]:
    assert pair is not None
    return pair


# -- what is checked and counted --------------------------------------------------------------------------------------


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
