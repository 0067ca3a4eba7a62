"""Entropy coding of integers with range coding: models that learn while they code, so that no table is sent.

Deep Compression (Han et al. 2016, arXiv:1510.00149, sec. 4) codes weights and the gaps between them with Huffman codes.
Ours is a range coder (Martin 1979; of the library constriction, https://bamler-lab.github.io/constriction), which also
spends fractions of a bit, and instead of gaps a flag for each weight. What is likely comes from what is known already:

- the values so far, as counts smoothed over their neighbours (:func:`code_symbols`), in chunks that grow by an eighth;
- for flags of a matrix the ones so far in the same row, the same column and the same place of the kernel
  (:func:`code_flags`), along diagonals, so that each step tells something about every row and column.

Each function here both writes and reads: with an :class:`Encoder` it is given values, with a :class:`Decoder` it is
not, and it returns them either way. Probabilities come from sums, products and quotients alone, which are the same to
the last bit on every machine.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import constriction
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

MAX_ALPHABET = 4096
"""Largest number of symbols whose frequencies are learned; wider integers send their low bits as they are."""
_SMOOTHING = ((0, 0.5), (0, 0.05), (1, 0.05), (3, 0.05), (8, 0.02), (20, 0.02), (50, 0.02), (120, 0.02))
"""How far a count spreads over its neighbours, and the share of a count that every symbol has from the start."""
_STRENGTHS = (0, 16, 64, 256)
"""How many flags of average density each row and column are taken to have had; 0: no rows and columns."""
_KERNEL_STRENGTH = 64
_SAMPLE = 1 << 13
"""Settings are chosen on so many values of a long array."""


class Encoder:
    """Writes. ``bits`` counts by ``part``, a label to be set, what the models make of it (before the coder's rounding).

    Args:
        dry: count only.
    """

    def __init__(self, *, dry: bool = False) -> None:
        self.bits: defaultdict[str, float] = defaultdict(float)
        self.part = ""
        self._coder = None if dry else constriction.stream.queue.RangeEncoder()

    def uniform(self, size: int, num: int, values: Array | None) -> Array:
        """``num`` integers below ``size``, all equally likely."""
        assert values is not None
        if size > 1 and num:
            self.bits[self.part] += num * np.log2(size)
            self._write(values, constriction.stream.model.Uniform(size))
        return values

    def categorical(self, weights: Array, num: int, values: Array | None) -> Array:
        """``num`` integers below ``len(weights)``, in proportion to ``weights``."""
        assert values is not None
        if len(weights) > 1 and num:
            counts = np.bincount(values, minlength=len(weights))
            seen = counts > 0
            self.bits[self.part] += float((counts[seen] * np.log2(weights.sum() / weights[seen])).sum())
            self._write(values, constriction.stream.model.Categorical(weights, perfect=False))
        return values

    def bernoulli(self, p: Array, flags: Array | None) -> Array:
        """A flag for each probability ``p`` of a one."""
        assert flags is not None
        self.bits[self.part] -= float(np.log2(np.where(flags, p, 1 - p)).sum())
        self._write(flags, constriction.stream.model.Bernoulli(perfect=False), p)
        return flags

    def choose(self, options: int, cost: Callable[["Encoder", int], object] | None) -> int:
        """The option that ``cost`` writes in the fewest bits."""
        assert cost is not None
        bits = []
        for option in range(options):
            trial = Encoder(dry=True)
            cost(trial, option)
            bits.append(sum(trial.bits.values()))
        best = int(np.argmin(bits))
        self.uniform(options, 1, np.array([best]))
        return best

    def to_bytes(self) -> bytes:
        assert self._coder is not None
        return self._coder.get_compressed().astype("<u4").tobytes()

    def _write(self, values: Array, *model: Any) -> None:
        if self._coder is not None:
            self._coder.encode(np.ascontiguousarray(values, dtype=np.int32), *model)


class Decoder:
    """Reads what an :class:`Encoder` wrote; every byte string means something, if not what was meant."""

    part = ""

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def uniform(self, size: int, num: int, values: Array | None = None) -> Array:
        if size == 1 or not num:
            return np.zeros(num, np.int64)
        return self._coder.decode(constriction.stream.model.Uniform(size), num).astype(np.int64)

    def categorical(self, weights: Array, num: int, values: Array | None = None) -> Array:
        if len(weights) == 1 or not num:
            return np.zeros(num, np.int64)
        model = constriction.stream.model.Categorical(weights, perfect=False)
        return self._coder.decode(model, num).astype(np.int64)

    def bernoulli(self, p: Array, flags: Array | None = None) -> Array:
        return self._coder.decode(constriction.stream.model.Bernoulli(perfect=False), p).astype(np.int64)

    def choose(self, options: int, cost: object = None) -> int:
        return int(self.uniform(options, 1)[0])

    @property
    def exhausted(self) -> bool:
        """Whether no more than the coder's own rest is left."""
        return self._coder.maybe_exhausted()


Coder = Encoder | Decoder


def code_number(coder: Coder, number: int | None = None) -> int:
    """One integer from 0 to 2^64 - 1: its length, then its bits (Elias 1975, gamma)."""
    length = int(coder.uniform(65, 1, None if number is None else np.array([number.bit_length()]))[0])
    if length < 2:
        return length
    low = None if number is None else np.array([number - (1 << (length - 1))], np.uint64)
    return (1 << (length - 1)) + int(_code_bits(coder, length - 1, 1, low)[0])


def code_integers(coder: Coder, num: int, integers: Array | None = None) -> Array:
    """``num`` integers of 64 bits that lie where their neighbours do: their high bits by :func:`code_symbols`."""
    first = last = None
    if integers is not None:
        first, last = (int(integers.min()), int(integers.max())) if num else (0, 0)
    start = _unfold(code_number(coder, None if first is None else _fold(first)))
    span = code_number(coder, None if first is None or last is None else last - first)
    if start < -(2**63) or start + span >= 2**63:
        raise ValueError("integers of more than 64 bits")
    # Differences modulo 2^64: int64 would not hold them all.
    offset = np.array([start], np.int64).view(np.uint64)
    distances = None if integers is None else integers.astype(np.int64).view(np.uint64) - offset
    low_bits = max(0, span.bit_length() - MAX_ALPHABET.bit_length() + 1)
    shift = np.uint64(low_bits)
    high = None if distances is None else (distances >> shift).astype(np.int64)
    low = None if distances is None else distances & np.uint64((1 << low_bits) - 1)
    high = code_symbols(coder, (span >> low_bits) + 1, num, high)
    whole = (high.astype(np.uint64) << shift) + _code_bits(coder, low_bits, num, low)
    return (whole + offset).view(np.int64)


def code_symbols(coder: Coder, alphabet: int, num: int, symbols: Array | None = None) -> Array:
    """``num`` symbols below ``alphabet``, at most :data:`MAX_ALPHABET`; near ones are taken to be alike."""
    if alphabet > MAX_ALPHABET:
        raise ValueError(f"an alphabet of {alphabet} symbols")
    if alphabet == 1:
        return np.zeros(num, np.int64)

    def cost(trial: Encoder, option: int) -> None:
        assert symbols is not None
        sample = symbols[:: max(1, num // _SAMPLE)]
        _code_chunks(trial, alphabet, len(sample), sample, *_SMOOTHING[option])

    smoothing = _SMOOTHING[coder.choose(len(_SMOOTHING), cost)]
    return _code_chunks(coder, alphabet, num, symbols, *smoothing)


def _code_chunks(coder: Coder, alphabet: int, num: int, symbols: Array | None, reach: int, floor: float) -> Array:
    counts = np.zeros(alphabet, np.int64)
    chunks = []
    done = 0
    while done < num:
        size = min(num - done, max(4, done // 8))
        weights = _spread(counts, reach) + floor
        chunks.append(coder.categorical(weights, size, None if symbols is None else symbols[done : done + size]))
        counts += np.bincount(chunks[-1], minlength=alphabet)
        done += size
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


def _spread(counts: Array, reach: int) -> Array:
    """Each count shared among the symbols at most ``reach`` away; sums of integers, exact."""
    if not reach:
        return counts.astype(np.float64)
    sums = np.concatenate([[0], np.cumsum(counts)])
    index = np.arange(len(counts))
    upper, lower = np.minimum(index + reach + 1, len(counts)), np.maximum(index - reach, 0)
    return (sums[upper] - sums[lower]) / (2 * reach + 1)


def code_flags(coder: Coder, shape: tuple[int, int, int], flags: Array | None = None) -> Array:
    """Zeros and ones ``[rows, columns, places of the kernel]``."""
    rows, columns, places = shape
    if columns > rows:
        turned = code_flags(coder, (columns, rows, places), None if flags is None else flags.transpose(1, 0, 2))
        return turned.transpose(1, 0, 2)
    ones = code_number(coder, None if flags is None else int(flags.sum()))
    num = rows * columns * places
    if not 0 < ones < num:
        if ones > num:
            raise ValueError("more ones than flags")
        return np.full(shape, int(ones > 0), np.int64)
    density = (ones + 0.5) / (num + 1)

    def cost(trial: Encoder, option: int) -> None:
        assert flags is not None
        sample = flags[: max(1, 32 * _SAMPLE // (columns * places))]
        _code_diagonals(trial, (len(sample), columns, places), density, _STRENGTHS[option], sample)

    strength = _STRENGTHS[coder.choose(len(_STRENGTHS), cost)]
    return _code_diagonals(coder, shape, density, strength, flags)


def _code_diagonals(
    coder: Coder, shape: tuple[int, int, int], density: float, strength: int, flags: Array | None
) -> Array:
    """The odds of a one: those on average, times how much they are raised by row, by column and by place."""
    rows, columns, places = shape
    if not strength:
        weights = np.array([1 - density, density])
        return coder.categorical(weights, rows * columns * places, None if flags is None else flags.ravel()).reshape(
            shape
        )
    found = np.zeros(shape, np.int64) if flags is None else flags
    prior_ones, prior_zeros = strength * density, strength * (1 - density)
    row = np.arange(rows)
    row_ones, column_ones, column_seen = np.zeros(rows), np.zeros(columns), np.zeros(columns)
    base = density / (1 - density)
    for place in range(places):
        place_ones, place_seen = 0, 0
        for step in range(columns):
            seen = place * columns + step
            column = (row + step) % columns
            by_row = (row_ones + prior_ones) / (seen - row_ones + prior_zeros)
            by_column = (column_ones + prior_ones) / (column_seen - column_ones + prior_zeros)
            by_place = (place_ones + _KERNEL_STRENGTH * density) / (
                place_seen - place_ones + _KERNEL_STRENGTH * (1 - density)
            )
            odds = by_row * by_column[column] * (by_place / (base * base))
            p = np.minimum(np.maximum(odds / (1 + odds), 2.0**-14), 1 - 2.0**-14)
            new = coder.bernoulli(p, None if flags is None else flags[row, column, place])
            found[row, column, place] = new
            row_ones += new
            column_ones += np.bincount(column, weights=new, minlength=columns)
            column_seen += np.bincount(column, minlength=columns)
            place_ones += int(new.sum())
            place_seen += rows
    return found


def _code_bits(coder: Coder, length: int, num: int, integers: Array | None) -> Array:
    """``num`` integers of ``length`` bits that nothing is known of, 16 bits at a time."""
    whole = np.zeros(num, np.uint64)
    for shift in range(0, length, 16):
        size = min(16, length - shift)
        part = None if integers is None else (integers >> np.uint64(shift)) & np.uint64((1 << size) - 1)
        whole |= coder.uniform(1 << size, num, part).astype(np.uint64) << np.uint64(shift)
    return whole


def _fold(number: int) -> int:
    """0, -1, 1, -2 … -> 0, 1, 2, 3 …"""
    return 2 * number if number >= 0 else -2 * number - 1


def _unfold(number: int) -> int:
    return number // 2 if number % 2 == 0 else -(number + 1) // 2
