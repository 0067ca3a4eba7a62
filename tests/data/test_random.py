"""The hash is uniform, independent between draws, images, epochs, seeds and streams, and a pure function of them."""

import pytest
import torch

from project.data.random import AUGMENT, ORDER, BatchRandom

N = 100_000


def uniform(seed: int = 0, epoch: int = 0, stream: int = AUGMENT, num: int = N) -> torch.Tensor:
    return BatchRandom(seed, epoch, torch.arange(num), stream).uniform()


def test_uniform_fills_the_interval_evenly() -> None:
    x = uniform()
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    chi_square = ((counts - N / 100) ** 2 / (N / 100)).sum()
    assert chi_square < 99 + 5 * (2 * 99) ** 0.5


def test_every_bit_is_fair() -> None:
    bits = BatchRandom(7, 3, torch.arange(N)).bits(2)
    share = (bits[..., None] >> torch.arange(32) & 1).float().mean(0)
    assert (share - 0.5).abs().max() < 5 * 0.5 / N**0.5


def test_avalanche_of_neighbouring_images_epochs_and_seeds() -> None:
    images = torch.arange(2000)
    base = BatchRandom(0, 0, images).bits()
    for other in (
        BatchRandom(0, 0, images + 1),
        BatchRandom(0, 1, images),
        BatchRandom(1, 0, images),
        BatchRandom(2**32, 0, images),
        BatchRandom(0, 0, images, ORDER),
    ):
        flipped = (base ^ other.bits())[:, None] >> torch.arange(32) & 1
        assert (flipped.float().mean(0) - 0.5).abs().max() < 0.06


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


@pytest.mark.parametrize("lag", [1, 2, 64])
def test_images_are_uncorrelated(lag: int) -> None:
    x = uniform()
    assert abs(correlation(x[lag:], x[:-lag])) < 5 / N**0.5


def test_draws_elements_epochs_seeds_and_streams_are_uncorrelated() -> None:
    random = BatchRandom(0, 0, torch.arange(N))
    columns = [random.uniform(), random.uniform(), *random.uniform(3).unbind(1), uniform(epoch=1), uniform(seed=1)]
    columns += [uniform(stream=ORDER), uniform(seed=2, epoch=1)]
    off_diagonal = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert off_diagonal.abs().max() < 5 / N**0.5


def test_pairs_of_draws_fill_the_square_evenly() -> None:
    x, y = BatchRandom(5, 5, torch.arange(N)).uniform(2).unbind(1)
    counts = torch.bincount((x * 16).long() * 16 + (y * 16).long(), minlength=256).float()
    assert ((counts - N / 256) ** 2 / (N / 256)).sum() < 255 + 5 * (2 * 255) ** 0.5


def test_pure_function_of_the_image_whatever_the_batch() -> None:
    whole = BatchRandom(1, 2, torch.arange(100))
    first, second = whole.uniform(), whole.integers(0, 9, 2, 3)
    part = BatchRandom(1, 2, torch.tensor([42, 7]))
    assert torch.equal(part.uniform(), first[[42, 7]])
    assert torch.equal(part.integers(0, 9, 2, 3), second[[42, 7]])


def test_known_values() -> None:
    """Runs on another machine or version see the same numbers."""
    assert BatchRandom(0, 0, torch.arange(3)).bits().tolist() == [3348750425, 3517381698, 825660869]


def test_integers_bernoulli_bytes_and_permutation() -> None:
    random = BatchRandom(0, 0, torch.arange(N))
    integers = random.integers(-2, 3)
    assert integers.unique().tolist() == [-2, -1, 0, 1, 2]
    assert (integers.add(2).bincount() / N - 0.2).abs().max() < 0.01
    assert not random.bernoulli(0.0).any() and random.bernoulli(1.0).all()
    assert abs(float(random.bernoulli(0.3).float().mean()) - 0.3) < 0.01
    noise = BatchRandom(0, 0, torch.arange(200)).bytes(3, 5, 7)
    assert noise.shape == (200, 3, 5, 7) and noise.dtype == torch.uint8
    assert (noise.flatten().long().bincount(minlength=256) > 0).all() and abs(float(noise.float().mean()) - 127.5) < 2.5
    assert torch.equal(random.permutation().sort().values, torch.arange(N))
    assert len(BatchRandom(0, 0, torch.arange(N)).bits().unique()) == N
