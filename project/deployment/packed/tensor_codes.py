"""Store tensors as integers without any loss, in the form that suits their values.

- Floating point values become fixed point numbers if few bits hold them, otherwise the narrowest exact float format.
- If many values are zero, their positions are stored apart, as flags.
- If a tensor has few distinct values, they are stored as a codebook (weight sharing: Deep Compression, Han et al. 2016,
  arXiv:1510.00149, sec. 3).
- If each row (filter) has two values, a flag for each weight is stored (XNOR-Net, Rastegari et al. 2016,
  arXiv:1603.05279, sec. 3.1).

The form is chosen from the values alone. So a net that was not compressed can be stored as well, at about 27 bits for
each weight. :mod:`project.deployment.packed.bitstream` does the entropy coding. As there, each ``code_`` function both
writes and reads: it gets the values to write, or ``None`` to read them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from project.deployment.packed.bitstream import (
    MAX_ALPHABET,
    Array,
    Coder,
    code_flags,
    code_integers,
    code_number,
    code_symbols,
)

_FIXED_BITS = 12
"""Number of bits of the largest integers that count as fixed point numbers."""
_KINDS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float32: (torch.float16, torch.bfloat16, torch.float32),
    torch.float16: (torch.float16,),
    torch.bfloat16: (torch.bfloat16,),
    torch.float64: (torch.float64,),
}
"""Formats that the values of a tensor are stored in, for each floating point type."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TYPES = (*_KINDS, *_INTEGERS.values(), torch.uint8, torch.bool)
"""Types of tensors that can be stored."""


def groups_of(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the tensors that are stored together.

    Each weight (two or more dimensions) is a group of its own. Vectors and scalars with the same last part of the name,
    such as ``bias``, and the same type form a group, because their values are similar.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        key = (name,) if tensor.dim() > 1 else (name.rpartition(".")[2], tensor.dtype, "")
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def code_group(
    coder: Coder, tensors: Mapping[str, Tensor] | None, names: Sequence[str], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Write or read the tensors of a group of :func:`groups_of`.

    The tensors that are fixed point numbers are stored as one array of integers, and the other tensors as another.

    Args:
        coder: encoder to write with, or decoder to read from.
        tensors: tensors to write, by name; ``None`` reads them.
        names: names of the tensors in the group.
        like: tensors of the same shapes and types, by name; their values are not used.

    Returns:
        The tensors of the group, by name.
    """
    dtype = like[names[0]].dtype
    if dtype not in _KINDS:  # integers and booleans
        given = None if tensors is None else [_integers(tensors[name]) for name in names]
        smallest, largest = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        return {
            name: torch.from_numpy(_checked(part, smallest, largest)).to(dtype).reshape(like[name].shape)
            for name, part in _code_arrays(coder, names, like, given)
        }
    # One flag for each tensor: is it fixed point?
    fixed = None if tensors is None else {name: _to_fixed(tensors[name]) for name in names}
    is_fixed = None if fixed is None else np.array([fixed[name] is not None for name in names], np.int64)
    is_fixed = code_symbols(coder, 2, len(names), is_fixed)
    found = {}
    points = [name for name, flag in zip(names, is_fixed, strict=True) if flag]
    if points:  # an exponent for each tensor, then the integers of all of them
        pairs = None if fixed is None else [_known(fixed[name]) for name in points]
        exponents = None if pairs is None else np.array([exponent for exponent, _ in pairs], np.int64)
        exponents = code_integers(coder, len(points), exponents)
        given = None if pairs is None else [integers for _, integers in pairs]
        for (name, part), exponent in zip(_code_arrays(coder, points, like, given), exponents, strict=True):
            found[name] = _from_fixed(part, int(exponent), dtype).reshape(like[name].shape)
    floats = [name for name, flag in zip(names, is_fixed, strict=True) if not flag]
    if floats:  # one floating point format for all of them, then their bits as integers
        values = None if tensors is None else [tensors[name] for name in floats]
        kind = _code_kind(coder, dtype, values)
        given = None if values is None else [_ordered(value.to(kind)) for value in values]
        for name, part in _code_arrays(coder, floats, like, given):
            found[name] = _from_ordered(part, kind).to(dtype).reshape(like[name].shape)
    return found


def _code_kind(coder: Coder, dtype: torch.dtype, values: Sequence[Tensor] | None) -> torch.dtype:
    """The floating point format that holds all values exactly and whose integers span the smallest range."""
    kinds = _KINDS[dtype]
    if values is None:
        return kinds[int(coder.uniform(len(kinds), 1, None)[0])]
    # Compare bits, not values: -0 equals 0, and no NaN equals itself.
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
    """Integers of several tensors as one array.

    A weight ``[out, in, ...]`` is a matrix of ``out`` rows, ``in`` columns and the places of its kernel. Vectors become
    one column.
    """
    sizes = [like[name].numel() for name in names]
    shape = like[names[0]].shape
    rows, columns = (shape[0], shape[1]) if len(shape) > 1 else (sum(sizes), 1)
    places = sum(sizes) // max(1, rows * columns)
    values = None if given is None else np.concatenate(given)
    found = _code_array(coder, (rows, columns, places), values)
    yield from zip(names, np.split(found, np.cumsum(sizes)[:-1]), strict=True)


def _code_array(coder: Coder, shape: tuple[int, int, int], values: Array | None) -> Array:
    """An array ``[rows, columns, places]`` of integers.

    If more than a quarter of the values are zero, flags say where the others are, and only these are stored.
    """
    num = math.prod(shape)
    if not num:
        return np.zeros(0, np.int64)
    sparse = None if values is None else np.array([4 * np.count_nonzero(values == 0) > num], np.int64)
    if not coder.uniform(2, 1, sparse)[0]:
        return _code_values(coder, shape, values)
    coder.part = "positions"
    flags = code_flags(coder, shape, None if values is None else (values.reshape(shape) != 0).astype(np.int64))
    kept = flags.reshape(-1) != 0
    found = np.zeros(num, np.int64)
    if kept.any():
        shape = (1, int(kept.sum()), 1)
        found[kept] = _code_values(coder, shape, None if values is None else values[kept])
    return found


def _code_values(coder: Coder, shape: tuple[int, int, int], values: Array | None) -> Array:
    """Integers in the layout that takes fewer bits: as they are, or through a codebook."""
    num = math.prod(shape)
    distinct = None if values is None else np.unique(values)
    if values is not None and distinct is not None and _has_pairs(shape, values, len(distinct)):
        distinct = distinct[:0]  # an empty codebook is the sign for two values in each row
    too_many = distinct is not None and len(distinct) > min(MAX_ALPHABET, num // 2 + 1)  # for a codebook
    only = 0 if too_many else None
    layout = coder.choose(2, lambda trial, option: _code_layout(trial, option, shape, values, distinct), only)
    return _code_layout(coder, layout, shape, values, distinct)


def _code_layout(
    coder: Coder, layout: int, shape: tuple[int, int, int], values: Array | None, distinct: Array | None
) -> Array:
    """Integers as they are (layout 0), or as indices into a codebook (layout 1).

    An empty codebook means that each row has two values.
    """
    num = math.prod(shape)
    if layout == 0:
        coder.part = "values"
        return code_integers(coder, num, values)
    coder.part = "codebook"
    codebook = _code_codebook(coder, distinct)
    if not len(codebook):
        return _code_pairs(coder, shape, values)
    coder.part = "values"
    symbols = None if values is None else np.searchsorted(codebook, values)
    return codebook[code_symbols(coder, len(codebook), num, symbols)]


def _code_codebook(coder: Coder, distinct: Array | None) -> Array:
    """The distinct values in rising order: the first one, then the differences."""
    steps = None if distinct is None else np.diff(distinct, prepend=0)
    num = code_number(coder, None if steps is None else len(steps))
    if num > MAX_ALPHABET:
        raise ValueError(f"it has a codebook of {num} values, more than {MAX_ALPHABET}")
    if not num:
        return np.zeros(0, np.int64)
    first = code_integers(coder, 1, None if steps is None else steps[:1])
    rest = code_integers(coder, num - 1, None if steps is None else steps[1:])
    return np.cumsum(np.concatenate([first, rest]))


def _has_pairs(shape: tuple[int, int, int], values: Array, num_distinct: int) -> bool:
    """Whether every row has at most two values, and it pays to store the two values of each row."""
    rows = values.reshape(shape[0], -1)
    extremes = (rows == rows.min(1, keepdims=True)) | (rows == rows.max(1, keepdims=True))
    return num_distinct > 4 and rows.shape[1] >= 8 and bool(extremes.all())


def _code_pairs(coder: Coder, shape: tuple[int, int, int], values: Array | None) -> Array:
    """Rows of two values: the larger value and the sum of both for each row, and a flag for each weight.

    The sums cost few bits: binary filters have the values -a and a, so each sum is 0.
    """
    high = sums = flags = None
    if values is not None:
        rows = values.reshape(shape[0], -1)
        high, low = rows.max(1), rows.min(1)
        # A row with only one value takes the sum of another row, which costs fewer bits than a sum of its own.
        sums = np.where(high == low, (high + low)[np.argmin(high == low)], high + low)
        flags = (rows == high[:, None]).astype(np.int64).reshape(shape)
    coder.part = "codebook"
    high, sums = code_integers(coder, shape[0], high), code_integers(coder, shape[0], sums)
    coder.part = "values"
    flags = code_flags(coder, shape, flags)
    return np.where(flags != 0, high[:, None, None], (sums - high)[:, None, None]).reshape(-1)


# -- values as integers -----------------------------------------------------------------------------------------------


def _integers(tensor: Tensor) -> Array:
    """The values of an integer or boolean tensor, flattened."""
    return tensor.reshape(-1).to(torch.int64).numpy()


def _bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers. So -0 and each NaN keep their bits."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _ordered(tensor: Tensor) -> Array:
    """Floating point numbers as integers in the same order; +0 is 0, -0 is -1.

    The bits of positive floats already rise with the value. Those of negative floats fall, so they are inverted.
    """
    bits = _bits(tensor).reshape(-1).to(torch.int64).numpy()
    return np.where(bits < 0, ~(bits & _largest(tensor.dtype)), bits)


def _from_ordered(integers: Array, kind: torch.dtype) -> Tensor:
    """Undo :func:`_ordered`."""
    largest = _largest(kind)
    integers = _checked(integers, -largest - 1, largest)
    bits = np.where(integers < 0, ~integers + (-largest - 1), integers)
    return torch.from_numpy(bits).to(_INTEGERS[kind.itemsize]).view(kind)


def _checked(integers: Array, smallest: int, largest: int) -> Array:
    """The integers, after a check that all are in a range. A damaged file holds others."""
    if len(integers) and not smallest <= int(integers.min()) <= int(integers.max()) <= largest:
        raise ValueError(f"it holds values outside the range from {smallest} to {largest}")
    return integers


def _largest(kind: torch.dtype) -> int:
    """The largest integer that has as many bits as a number of this format."""
    return torch.iinfo(_INTEGERS[kind.itemsize]).max


def _to_fixed(tensor: Tensor) -> tuple[int, Array] | None:
    """(exponent, integers) with ``tensor = integers * 2^exponent``; ``None`` if the integers have more than 12 bits."""
    x = tensor.reshape(-1).to(torch.float64).numpy()
    nonzero = x[x != 0]
    if not np.isfinite(x).all() or np.signbit(x[x == 0]).any():
        return None  # an integer can be neither infinity nor NaN, and there is no integer -0
    if not len(nonzero):
        return 0, np.zeros(len(x), np.int64)
    # nonzero = lowest * 2^(exponents - 53) with whole numbers ``lowest``. lowest & -lowest is the lowest bit that is 1.
    # The smallest place of such a bit among all values is the common exponent.
    mantissas, exponents = np.frexp(nonzero)
    lowest = (mantissas * 2.0**53).astype(np.int64)
    exponent = int((exponents - 54 + np.frexp((lowest & -lowest).astype(np.float64))[1]).min())
    if exponents.max() - exponent > _FIXED_BITS:
        return None
    return exponent, np.ldexp(x, -exponent).astype(np.int64)


def _from_fixed(integers: Array, exponent: int, dtype: torch.dtype) -> Tensor:
    """Undo :func:`_to_fixed`."""
    if abs(exponent) > 1100:
        raise ValueError(f"it has an exponent of {exponent}, beyond those of floating point numbers")
    values = np.ldexp(integers.astype(np.float64), exponent)
    if not np.isfinite(values).all():
        raise ValueError("it holds values beyond those of floating point numbers")
    return torch.from_numpy(values).to(dtype)


def _known(pair: tuple[int, Array] | None) -> tuple[int, Array]:
    """The pair, for the type checker: it is never ``None`` here."""
    assert pair is not None
    return pair
