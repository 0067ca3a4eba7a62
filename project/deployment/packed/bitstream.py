"""Entropy coding of integers with a range coder. Its models learn while they code, so no table of codes is stored.

Deep Compression (Han et al. 2016, arXiv:1510.00149, sec. 4) codes weights, and the gaps between them, with Huffman
codes. We use a range coder (Martin 1979; from the library constriction, https://bamler-lab.github.io/constriction),
which also spends fractions of a bit, and a flag for each weight instead of gaps. A model predicts the next values from
those that are coded already:

- for numbers (:func:`code_symbols`): from the counts of the values so far, smoothed over neighbouring values. The
  values come in chunks, each an eighth as long as all before it;
- for flags of a matrix (:func:`code_flags`): from the ones so far in the same row, the same column and the same place
  of the kernel. The flags come diagonal by diagonal, so that each step adds a flag to every row.

Each ``code_`` function both writes and reads, so that both sides follow the same steps. With an :class:`Encoder` it
gets the values; with a :class:`Decoder` it gets ``None``. It returns the values in both cases. Probabilities are
computed with sums, products and quotients alone, which give the same bits on every machine.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import constriction
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

MAX_ALPHABET = 4096
"""Largest number of symbols whose frequencies are learned. Of wider integers, the low bits are stored as they are."""
_SMOOTHING = ((0, 0.5), (0, 0.05), (1, 0.05), (3, 0.05), (8, 0.02), (20, 0.02), (50, 0.02), (120, 0.02))
"""Settings of a model of symbols: how far each count spreads over its neighbours, and the count that every symbol has
before the first value."""
_STRENGTHS = (0, 16, 64, 256)
"""Settings of a model of flags: the number of imaginary flags of average density that each row and each column starts
with. 0 means one density for all rows and columns."""
_KERNEL_STRENGTH = 64
"""The number of imaginary flags of average density that each place of the kernel starts with."""
_SAMPLE = 1 << 13
"""Number of values of a long array on which settings are chosen."""


class Encoder:
    """Writes values into a byte string.

    ``bits`` counts the bits that the models predict (before the coder's rounding) under the label ``part``. Set
    ``part`` before you write.

    Args:
        dry: whether to count bits only, without writing them.
        choices: numbers of the options that :meth:`choose` takes, in order, such as :attr:`Decoder.choices`. ``None``
            takes the cheapest options.
    """

    def __init__(self, *, dry: bool = False, choices: Sequence[int] | None = None) -> None:
        self.bits: defaultdict[str, float] = defaultdict(float)
        self.part = ""
        self.steps = 0
        self._choices = None if choices is None else iter(choices)
        self._coder = None if dry else constriction.stream.queue.RangeEncoder()

    def uniform(self, size: int, num: int, values: Array | None) -> Array:
        """Write ``num`` integers from 0 to ``size - 1``, all equally likely."""
        assert values is not None
        if size > 1 and num:
            self.bits[self.part] += num * np.log2(size)
            self._write(values, constriction.stream.model.Uniform(size))
        return values

    def categorical(self, weights: Array, num: int, values: Array | None) -> Array:
        """Write ``num`` integers from 0 to ``len(weights) - 1``, with probabilities in proportion to ``weights``."""
        assert values is not None
        if len(weights) > 1 and num:
            counts = np.bincount(values, minlength=len(weights))
            seen = counts > 0
            self.bits[self.part] += float((counts[seen] * np.log2(weights.sum() / weights[seen])).sum())
            self._write(values, constriction.stream.model.Categorical(weights, perfect=False))
        return values

    def bernoulli(self, p: Array, flags: Array | None) -> Array:
        """Write one flag (0 or 1) for each entry of ``p``, the probability of a 1."""
        assert flags is not None
        self.bits[self.part] -= float(np.log2(np.where(flags, p, 1 - p)).sum())
        self._write(flags, constriction.stream.model.Bernoulli(perfect=False), p)
        return flags

    def choose(self, options: int, cost: Callable[["Encoder", int], object] | None, only: int | None = None) -> int:
        """Write the number of the option, from 0 to ``options - 1``, for which ``cost`` writes the fewest bits.

        ``only`` is the number of the only option that is possible; ``None`` if all are.
        """
        assert cost is not None
        given = None if self._choices is None else next(self._choices, 0)
        if only is None and given is None:
            bits = []
            for option in range(options):
                trial = Encoder(dry=True)
                cost(trial, option)
                bits.append(sum(trial.bits.values()))
            given = int(np.argmin(bits))
        best = given if only is None else only
        assert best is not None
        self.uniform(options, 1, np.array([best]))
        return best

    def count_steps(self, num: int) -> None:
        """Count steps of Python's loop over diagonals, which take most of the time."""
        self.steps += num

    def to_bytes(self) -> bytes:
        assert self._coder is not None
        return self._coder.get_compressed().astype("<u4").tobytes()

    def _write(self, values: Array, *model: Any) -> None:
        if self._coder is not None:
            self._coder.encode(np.ascontiguousarray(values, dtype=np.int32), *model)


class Decoder:
    """Reads what an :class:`Encoder` wrote. A damaged byte string gives wrong values, not an error.

    ``choices`` are the numbers of the options that were read so far.

    Args:
        data: bytes that :meth:`Encoder.to_bytes` returned; their number is a multiple of 4.
        max_steps: largest number of steps, so that a small file cannot take much time. ``None`` sets no limit.
    """

    part = ""

    def __init__(self, data: bytes, max_steps: int | None = None) -> None:
        self.choices: list[int] = []
        self.steps = 0
        self._max_steps = max_steps
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

    def choose(self, options: int, cost: object = None, only: int | None = None) -> int:
        self.choices.append(int(self.uniform(options, 1)[0]))
        return self.choices[-1]

    def count_steps(self, num: int) -> None:
        """Count steps.

        Raises:
            ValueError: if there are more than ``max_steps``.
        """
        self.steps += num
        if self._max_steps is not None and self.steps > self._max_steps:
            raise ValueError("it would take more time to read than a file of its size may")

    @property
    def exhausted(self) -> bool:
        """Whether all values may have been read: nothing is left but the bits with which the encoder ended."""
        return self._coder.maybe_exhausted()


Coder = Encoder | Decoder


def code_number(coder: Coder, number: int | None = None) -> int:
    """One integer from 0 to 2^64 - 1: its length in bits, then these bits (Elias 1975, gamma)."""
    length = int(coder.uniform(65, 1, None if number is None else np.array([number.bit_length()]))[0])
    if length < 2:
        return length
    # The highest bit is always 1, so it is not stored.
    low = None if number is None else np.array([number - (1 << (length - 1))], np.uint64)
    return (1 << (length - 1)) + int(_code_bits(coder, length - 1, 1, low)[0])


def code_integers(coder: Coder, num: int, integers: Array | None = None) -> Array:
    """``num`` integers of 64 bits in a common range. :func:`code_symbols` codes their high bits."""
    first = last = None
    if integers is not None:
        first, last = (int(integers.min()), int(integers.max())) if num else (0, 0)
    start = _unfold(code_number(coder, None if first is None else _fold(first)))
    span = code_number(coder, None if first is None or last is None else last - first)
    if start < -(2**63) or start + span >= 2**63:
        raise ValueError("it holds integers of more than 64 bits")
    # Distances from the smallest integer, modulo 2^64: int64 cannot hold a distance of 2^63 or more.
    offset = np.array([start], np.int64).view(np.uint64)
    distances = None if integers is None else integers.astype(np.int64).view(np.uint64) - offset
    # The high bits are at most 4096 symbols, whose frequencies are learned. The low bits are stored as they are.
    low_bits = max(0, span.bit_length() - MAX_ALPHABET.bit_length() + 1)
    shift = np.uint64(low_bits)
    high = None if distances is None else (distances >> shift).astype(np.int64)
    low = None if distances is None else distances & np.uint64((1 << low_bits) - 1)
    high = code_symbols(coder, (span >> low_bits) + 1, num, high)
    whole = (high.astype(np.uint64) << shift) + _code_bits(coder, low_bits, num, low)
    return (whole + offset).view(np.int64)


def code_symbols(coder: Coder, alphabet: int, num: int, symbols: Array | None = None) -> Array:
    """``num`` symbols from 0 to ``alphabet - 1``. Symbols that are close to each other count as similarly frequent.

    ``alphabet`` is at most :data:`MAX_ALPHABET`.
    """
    if alphabet > MAX_ALPHABET:
        raise ValueError(f"it has an alphabet of {alphabet} symbols, more than {MAX_ALPHABET}")
    if alphabet == 1:
        return np.zeros(num, np.int64)

    def cost(trial: Encoder, option: int) -> None:
        assert symbols is not None
        sample = symbols[:: max(1, num // _SAMPLE)]
        _code_chunks(trial, alphabet, len(sample), sample, *_SMOOTHING[option])

    # The encoder tries each setting on a sample and stores its number; the decoder reads the number.
    smoothing = _SMOOTHING[coder.choose(len(_SMOOTHING), cost)]
    return _code_chunks(coder, alphabet, num, symbols, *smoothing)


def _code_chunks(coder: Coder, alphabet: int, num: int, symbols: Array | None, reach: int, floor: float) -> Array:
    """Symbols in chunks, each with the frequencies of all symbols before it."""
    counts = np.zeros(alphabet, np.int64)
    chunks = []
    done = 0
    while done < num:
        size = min(num - done, max(4, done // 8))  # long chunks are fast, and the frequencies hardly change in them
        weights = _spread(counts, reach) + floor
        chunks.append(coder.categorical(weights, size, None if symbols is None else symbols[done : done + size]))
        counts += np.bincount(chunks[-1], minlength=alphabet)
        done += size
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


def _spread(counts: Array, reach: int) -> Array:
    """Each count spread evenly over the symbols at most ``reach`` away. The sums are of integers, so they are exact."""
    if not reach:
        return counts.astype(np.float64)
    sums = np.concatenate([[0], np.cumsum(counts)])
    index = np.arange(len(counts))
    upper, lower = np.minimum(index + reach + 1, len(counts)), np.maximum(index - reach, 0)
    return (sums[upper] - sums[lower]) / (2 * reach + 1)


def code_flags(coder: Coder, shape: tuple[int, int, int], flags: Array | None = None) -> Array:
    """Zeros and ones of shape ``[rows, columns, places of the kernel]``."""
    rows, columns, places = shape
    if columns > rows:  # transposed, the matrix takes fewer steps: there is one step for each column
        turned = code_flags(coder, (columns, rows, places), None if flags is None else flags.transpose(1, 0, 2))
        return turned.transpose(1, 0, 2)
    ones = code_number(coder, None if flags is None else int(flags.sum()))
    num = rows * columns * places
    if not 0 < ones < num:  # all flags are equal, so the number of ones is enough
        if ones > num:
            raise ValueError("it has more ones than flags")
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
    """Flags with the odds of a 1 from the flags before: the average odds, times a factor each for the flag's row, its
    column and its place of the kernel.

    A factor is the odds among the flags so far in that row (column, place) divided by the average odds. ``strength``
    imaginary flags of average density keep it near 1 as long as few flags are known.
    """
    rows, columns, places = shape
    if not strength:
        weights = np.array([1 - density, density])
        return coder.categorical(weights, rows * columns * places, None if flags is None else flags.ravel()).reshape(
            shape
        )
    coder.count_steps(places * columns)
    found = np.zeros(shape, np.int64) if flags is None else flags
    prior_ones, prior_zeros = strength * density, strength * (1 - density)
    row = np.arange(rows)
    # Ones so far in each row and column, and flags so far in each column. A row gets one flag in each step.
    row_ones, column_ones, column_seen = np.zeros(rows), np.zeros(columns), np.zeros(columns)
    base = density / (1 - density)
    for place in range(places):
        place_ones, place_seen = 0, 0
        for step in range(columns):
            seen = place * columns + step
            column = (row + step) % columns  # [rows]: row r is at column r + step, so a step is a diagonal
            by_row = (row_ones + prior_ones) / (seen - row_ones + prior_zeros)
            by_column = (column_ones + prior_ones) / (column_seen - column_ones + prior_zeros)
            by_place = (place_ones + _KERNEL_STRENGTH * density) / (
                place_seen - place_ones + _KERNEL_STRENGTH * (1 - density)
            )
            # base * (by_row / base) * (by_column / base) * (by_place / base)
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
    """``num`` integers of ``length`` bits, all equally likely, 16 bits at a time."""
    whole = np.zeros(num, np.uint64)
    for shift in range(0, length, 16):
        size = min(16, length - shift)
        part = None if integers is None else (integers >> np.uint64(shift)) & np.uint64((1 << size) - 1)
        whole |= coder.uniform(1 << size, num, part).astype(np.uint64) << np.uint64(shift)
    return whole


def _fold(number: int) -> int:
    """Integers to numbers from 0 on: 0, -1, 1, -2 … -> 0, 1, 2, 3 …"""
    return 2 * number if number >= 0 else -2 * number - 1


def _unfold(number: int) -> int:
    """Undo :func:`_fold`."""
    return number // 2 if number % 2 == 0 else -(number + 1) // 2
