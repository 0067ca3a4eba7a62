"""The entropy coder: what is written is read, and in how many bits."""

import numpy as np
import pytest

from project.deployment.packed.bitstream import (
    Array,
    Decoder,
    Encoder,
    code_flags,
    code_integers,
    code_number,
    code_symbols,
)


def there_and_back(code, *args):
    """Bits and bytes of what ``code(coder, *args)`` wrote; it must read the same, and nothing may be left."""
    encoder = Encoder()
    code(encoder, *args)
    decoder = Decoder(encoder.to_bytes())
    found = code(decoder, *args[:-1])
    assert np.array_equal(found, args[-1])
    assert decoder.exhausted
    return sum(encoder.bits.values()), len(encoder.to_bytes())


def entropy_bits(values: Array) -> float:
    _, counts = np.unique(values, return_counts=True)
    return float((counts * np.log2(len(values) / counts)).sum())


@pytest.mark.parametrize("number", [0, 1, 2, 3, 255, 2**16 - 1, 2**16, 2**33 + 5, 2**64 - 1])
def test_a_number_of_any_size(number):
    there_and_back(code_number, number)


@pytest.mark.parametrize(
    "values",
    [[], [7], [7, 7, 7], [-(2**63), 2**63 - 1, 0], [0, -1, 2**40], list(range(-3000, 3000)), [-5, 10**6] * 50],
)
def test_integers_of_any_size(values):
    there_and_back(code_integers, len(values), np.array(values, np.int64))


@pytest.mark.parametrize("seed", range(2))
def test_random_integers(seed):
    generator = np.random.default_rng(seed)
    for _ in range(10):
        width, num = int(generator.integers(1, 63)), int(generator.integers(1, 2000))
        there_and_back(code_integers, num, generator.integers(-(2**width), 2**width, num))


@pytest.mark.parametrize("alphabet", [1, 2, 16, 255])
def test_symbols_cost_their_entropy(alphabet):
    generator = np.random.default_rng(0)
    weights = generator.gamma(0.7, size=alphabet)
    symbols = generator.choice(alphabet, 30_000, p=weights / weights.sum())
    bits, size = there_and_back(code_symbols, alphabet, len(symbols), symbols)
    assert bits <= 1.01 * entropy_bits(symbols) + 12 * alphabet
    assert 8 * size <= bits * 1.001 + 64  # what the coder adds to the model


def test_few_values_near_each_other_cost_less_than_their_alphabet():
    """As norms' scales: a thousand integers of eight bits, which a table of frequencies would not pay for."""
    symbols = np.clip(np.random.default_rng(0).normal(128, 20, 1000).round(), 0, 255).astype(np.int64)
    bits, _ = there_and_back(code_symbols, 256, 1000, symbols)
    ideal = 1000 * np.log2(20 * np.sqrt(2 * np.pi * np.e))
    assert ideal * 0.97 < bits < ideal * 1.03 + 60


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 1), (1, 9, 1), (30, 70, 1), (70, 30, 9), (12, 12, 4)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_flags_of_any_shape(shape, density):
    flags = (np.random.default_rng(0).random(shape) < density).astype(np.int64)
    there_and_back(code_flags, shape, flags)


def test_flags_alike_cost_their_entropy():
    flags = (np.random.default_rng(0).random((300, 200, 1)) < 0.07).astype(np.int64)
    bits, size = there_and_back(code_flags, flags.shape, flags)
    assert 8 * size <= 1.005 * entropy_bits(flags.ravel()) + 64
    assert bits == pytest.approx(8 * size, abs=64)


@pytest.mark.parametrize("along", [0, 1])
def test_flags_of_uneven_rows_or_columns_cost_less_than_their_entropy(along):
    """Half of the rows (columns) empty, as after a filter has died: the entropy of the dense half is what is left."""
    generator = np.random.default_rng(0)
    flags = (generator.random((128, 64, 9)) < 0.1).astype(np.int64)
    dead = generator.permutation(flags.shape[along])[: flags.shape[along] // 2]
    flags[dead if along == 0 else (slice(None), dead)] = 0
    bits, _ = there_and_back(code_flags, flags.shape, flags)
    alive = np.delete(flags, dead, axis=along)
    assert bits < 1.05 * entropy_bits(alive.ravel()) < 0.9 * entropy_bits(flags.ravel())


def test_a_dry_run_counts_the_same_bits():
    flags = (np.random.default_rng(0).random((40, 30, 9)) < 0.07).astype(np.int64)
    wet, dry = Encoder(), Encoder(dry=True)
    for coder in (wet, dry):
        code_flags(coder, flags.shape, flags)
        code_integers(coder, 9, np.arange(9) ** 5)
    assert wet.bits == dry.bits


def test_any_bytes_are_read_or_refused():
    """No more than that: a decoder cannot know that they are wrong, but it must end, and in an ordinary error."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        decoder = Decoder(generator.bytes(4 * int(generator.integers(0, 40))))
        try:
            for _ in range(5):
                values = code_integers(decoder, 50)
                flags = code_flags(decoder, (6, 5, 4))
                assert len(values) == 50 and set(flags.ravel().tolist()) <= {0, 1}
        except (ValueError, AssertionError):
            continue
