"""Random numbers that are a pure function of (seed, epoch, image): a counter-based hash, with no state to save.

A generator that is advanced batch by batch makes an image's augmentation depend on batch size, worker, rank and on
every number drawn before it; a resumed run then differs from one never stopped. Here each number is a hash of what it
belongs to: the idea of Parallel random numbers: as easy as 1, 2, 3, Salmon et al. 2011
(https://doi.org/10.1145/2063384.2063405, sec. 3), with a lighter mixer.

The mixer is a bijection of 32 bits: three xor-shifts and two odd multiplications, with the constants of Prospecting
for hash functions, Wellons 2018 (https://nullprogram.com/blog/2018/07/31/; bias 0.17, full avalanche). Two rounds of
it are taken per number. Words of 32 bits lie in int64 tensors, which every device multiplies exactly. Good for
augmentation and shuffling; not for cryptography.
"""

from collections.abc import Callable
from copy import copy
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

AUGMENT, ORDER, SPLIT, DECODE = range(4)
"""Streams: what the numbers are for, so that the order of the images says nothing about their augmentation."""

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: successive multiples spread evenly
_Word = TypeVar("_Word", int, Tensor)


class BatchRandom:
    """Random numbers for each image of a batch; each call takes the next draw number.

    Args:
        seed: the run's seed.
        epoch: the epoch, from 0.
        indices: ``[N]`` int64, each image's number in its data set; the numbers lie on its device.
        stream: purpose; streams are independent of each other.
    """

    def __init__(self, seed: int, epoch: int, indices: Tensor, stream: int = AUGMENT) -> None:
        first = _hash(1, seed & _MASK, seed >> 32 & _MASK, epoch, stream)
        second = _hash(2, seed & _MASK, seed >> 32 & _MASK, epoch, stream)
        # Both steps are bijections, so two images of one epoch never share a state.
        self._state = _mix(_mix(indices.long() & _MASK ^ first) + second & _MASK)
        self._num_draws = 0

    def __len__(self) -> int:
        return len(self._state)

    def over(self, gather: Callable[[Tensor], Tensor]) -> "BatchRandom":
        """The draws that are next, for more images: ``gather`` adds those of other processes."""
        more = copy(self)
        more._state = gather(self._state)
        return more

    def bits(self, *shape: int) -> Tensor:
        """32 random bits: ``[N, *shape]`` int64 in [0, 2**32)."""
        self._num_draws += 1
        first, second = _hash(3, self._num_draws), _hash(4, self._num_draws)
        if not shape:
            return _mix(_mix(self._state ^ first) + second & _MASK)
        element = _mix(torch.arange(prod(shape), device=self._state.device) * _GOLDEN + first & _MASK)
        return _mix(_mix(self._state[:, None] ^ element) + second & _MASK).view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1): ``[N, *shape]`` float32, multiples of 2**-24."""
        return (self.bits(*shape) >> 8).float() * 2.0**-24

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high), like ``torch.randint``: ``[N, *shape]`` int64 (bias below (high - low) / 2**32)."""
        return (self.bits(*shape) * (high - low) >> 32) + low

    def bytes(self, *shape: int) -> Tensor:
        """Random bytes: ``[N, *shape]`` uint8; four from each hash, for noise on every pixel."""
        words = self.bits(-(-prod(shape) // 4))
        return words.to(torch.int32).view(torch.uint8)[:, : prod(shape)].reshape(-1, *shape)

    def bernoulli(self, p: float, *shape: int) -> Tensor:
        """True with probability ``p``: ``[N, *shape]`` bool; never at 0, always at 1."""
        return self.uniform(*shape) < p

    def permutation(self) -> Tensor:
        """The positions 0..N-1 in random order, ``[N]`` int64: sorted by 32 bits of each, which never tie."""
        return self.bits().argsort()


def _mix(x: _Word) -> _Word:
    """One round of the 32-bit mixer, for numbers in [0, 2**32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _hash(*words: int) -> int:
    """32 bits that depend on every word and on their order."""
    state = 0
    for word in words:
        state = _mix(_mix(state + _GOLDEN & _MASK) ^ word & _MASK)
    return state
