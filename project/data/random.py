"""Random numbers that are a pure function of (seed, epoch, image): a counter-based hash, without a state to save.

An ordinary generator has a state that each draw changes. An image's augmentation then depends on the batch size, on the
worker, on the rank and on every number drawn before, and a resumed run differs from one that was never stopped. Here
each number is a hash of seed, epoch, image and number of the draw. The idea is that of Parallel random numbers: as easy
as 1, 2, 3, Salmon et al. 2011 (https://doi.org/10.1145/2063384.2063405, sec. 3), with a lighter mixer.

The mixer is a bijection of 32 bits: three xor-shifts and two odd multiplications, with the constants of Prospecting
for hash functions, Wellons 2018 (https://nullprogram.com/blog/2018/07/31/; bias 0.17, full avalanche). Each number
takes two rounds of the mixer. Words of 32 bits lie in int64 tensors, because every device multiplies int64 exactly. The
numbers are good for augmentation and shuffling, not for cryptography.
"""

from collections.abc import Callable
from copy import copy
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

AUGMENT, ORDER, SPLIT, DECODE = range(4)
"""Streams, one for each purpose of the numbers. The order of the images then tells nothing about their augmentation."""

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: successive multiples spread evenly
_Word = TypeVar("_Word", int, Tensor)


class BatchRandom:
    """Random numbers for each image of a batch.

    Each call of a method is one draw; the draws of a batch are counted from 1. A number depends on the arguments here
    and on the number of the draw, not on the other images of the batch.

    Example::

        >>> import torch
        >>> from project.data import BatchRandom
        >>> batch = BatchRandom(seed=0, epoch=3, indices=torch.tensor([7, 42]))
        >>> alone = BatchRandom(seed=0, epoch=3, indices=torch.tensor([42]))
        >>> torch.equal(batch.uniform(2)[1:], alone.uniform(2))
        True

    Args:
        seed: seed of the run; any int, of which the lowest 64 bits are used.
        epoch: number of the epoch, 0 or more.
        indices: index of each image in its data set, ``[N]`` int64. The random numbers lie on the device of this
            tensor.
        stream: purpose of the numbers: ``AUGMENT``, ``ORDER``, ``SPLIT`` or ``DECODE`` (0 to 3). The streams are
            independent of each other.
    """

    def __init__(self, seed: int, epoch: int, indices: Tensor, stream: int = AUGMENT) -> None:
        first = _hash(1, seed & _MASK, seed >> 32 & _MASK, epoch, stream)
        second = _hash(2, seed & _MASK, seed >> 32 & _MASK, epoch, stream)
        # Both steps are bijections of 32 bits, so two images of one epoch never have the same state.
        self._state = _mix(_mix(indices.long() & _MASK ^ first) + second & _MASK)
        self._num_draws = 0

    def __len__(self) -> int:
        return len(self._state)

    def over(self, gather: Callable[[Tensor], Tensor]) -> "BatchRandom":
        """The same draws for the images of all processes, from the next draw on.

        Args:
            gather: function that concatenates the tensors of all processes along the first dimension, such as
                :func:`project.learning.whole_batch.gather`.
        """
        more = copy(self)
        more._state = gather(self._state)
        return more

    def bits(self, *shape: int) -> Tensor:
        """32 random bits for each element: ``[N, *shape]`` int64 in [0, 2**32).

        Args:
            shape: sizes of the dimensions after the first; none gives ``[N]``.
        """
        self._num_draws += 1
        first, second = _hash(3, self._num_draws), _hash(4, self._num_draws)  # two keys of this draw
        if not shape:
            return _mix(_mix(self._state ^ first) + second & _MASK)
        # A hash of each element's position tells the elements of one image apart: [prod(shape)].
        element = _mix(torch.arange(prod(shape), device=self._state.device) * _GOLDEN + first & _MASK)
        return _mix(_mix(self._state[:, None] ^ element) + second & _MASK).view(-1, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1): ``[N, *shape]`` float32, multiples of 2**-24.

        Args:
            shape: sizes of the dimensions after the first; none gives ``[N]``.
        """
        return (self.bits(*shape) >> 8).float() * 2.0**-24

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high), like ``torch.randint``: ``[N, *shape]`` int64 (bias below (high - low) / 2**32).

        Args:
            low: smallest integer that is drawn; any int.
            high: one more than the largest integer that is drawn; at most ``low + 2**31``.
            shape: sizes of the dimensions after the first; none gives ``[N]``.
        """
        # Scaling 32 bits needs no division, and the product fits into int64.
        return (self.bits(*shape) * (high - low) >> 32) + low

    def bytes(self, *shape: int) -> Tensor:
        """Random bytes: ``[N, *shape]`` uint8. Each hash gives four of them, which makes noise for every pixel cheap.

        Args:
            shape: sizes of the dimensions after the first; none gives ``[N]``.
        """
        words = self.bits(-(-prod(shape) // 4))
        return words.to(torch.int32).view(torch.uint8)[:, : prod(shape)].reshape(-1, *shape)

    def bernoulli(self, p: float, *shape: int) -> Tensor:
        """True with probability ``p``: ``[N, *shape]`` bool.

        Args:
            p: probability of True, in [0, 1]. 0 never gives True, 1 always.
            shape: sizes of the dimensions after the first; none gives ``[N]``.
        """
        return self.uniform(*shape) < p

    def permutation(self) -> Tensor:
        """The positions 0 to N - 1 in random order, ``[N]`` int64.

        They are sorted by 32 random bits of each image, which are never equal for two images.
        """
        return self.bits().argsort()


def _mix(x: _Word) -> _Word:
    """One round of the 32-bit mixer, for numbers in [0, 2**32).

    An int64 product may overflow, but its lowest 32 bits stay right, and the mask keeps only these.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def _hash(*words: int) -> int:
    """32 bits that depend on every word and on their order."""
    state = 0
    for word in words:
        state = _mix(_mix(state + _GOLDEN & _MASK) ^ word & _MASK)
    return state
