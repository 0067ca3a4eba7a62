"""Data sets that return whole batches, and samplers for them. The order of an epoch depends on (seed, epoch) alone.

If a data set has the method ``__getitems__``, ``DataLoader`` calls it once with all indices of a batch. One gather from
one uint8 tensor then makes the batch, without a Python call per image. Workers, samplers and distributed samplers work
as usual.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from project.data.random import ORDER, BatchRandom

T = TypeVar("T")
Batch = tuple[Tensor, Tensor, Tensor]
"""Images ``[N, C, H, W]`` uint8, labels ``[N]`` int64, indices ``[N]`` int64 of the images in the whole data set."""


class BatchDataset(Dataset[Batch], ABC):
    """Base class of data sets of images that are read batch by batch. An object is a whole data set or a part of one.

    A subclass implements :meth:`images_at`.

    Example::

        >>> import numpy as np, torch
        >>> from project.data import BatchDataset
        >>> class NumpyImages(BatchDataset):  # the array may be a file on disk: np.memmap
        ...     pixels = np.zeros((6, 1, 8, 8), dtype=np.uint8)
        ...     def images_at(self, indices): return torch.from_numpy(self.pixels[indices.numpy()])
        >>> len(NumpyImages(labels=torch.arange(6)).subset(torch.tensor([0, 2])))
        2

    Args:
        labels: labels of the whole data set, ``[N]`` int64.
        indices: indices, in the whole data set, of the images of this part, in the order of the part. ``None`` takes
            all images.
    """

    def __init__(self, labels: Tensor, indices: Tensor | None = None) -> None:
        self.all_labels = labels
        self.indices = torch.arange(len(labels)) if indices is None else indices

    @property
    def labels(self) -> Tensor:
        """The labels of this part, ``[len(self)]`` int64."""
        return self.all_labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Batch:
        """The image at ``position`` as a batch of one image."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        indices = self.indices[torch.as_tensor(positions, dtype=torch.int64)]
        return self.images_at(indices), self.all_labels[indices], indices

    def set_epoch(self, epoch: int) -> None:
        """Called by :class:`EpochSampler` before each epoch. A data set that crops at random overrides this method.

        Args:
            epoch: number of the epoch that begins, 0 or more.
        """

    @abstractmethod
    def images_at(self, indices: Tensor) -> Tensor:
        """The images with these indices, ``[N, C, H, W]`` uint8.

        Args:
            indices: indices of the images in the whole data set, ``[N]`` int64.
        """

    def subset(self, positions: Tensor) -> Self:
        """A part of this data set. It shares the images with this one; nothing is copied.

        Args:
            positions: positions of the images in this data set, ``[M]`` int64. The part has this order.
        """
        part = copy(self)
        part.indices = self.indices[positions]
        return part


class ArrayDataset(BatchDataset):
    """Images in memory as one uint8 tensor.

    Example::

        >>> import torch
        >>> from project.data import ArrayDataset
        >>> pixels = torch.zeros(100, 1, 8, 8, dtype=torch.uint8)
        >>> dataset = ArrayDataset(pixels, labels=torch.arange(100) % 10)
        >>> images, labels, indices = dataset.__getitems__([3, 14])
        >>> images.shape, labels
        (torch.Size([2, 1, 8, 8]), tensor([3, 4]))

    Args:
        images: all images of the data set, ``[N, C, H, W]`` uint8.
        labels: labels of all images, ``[N]`` int64.
        indices: indices of the images that belong to this part, in the order of the part. ``None`` takes all images.

    Raises:
        ValueError: if images or labels are no such tensors.
    """

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        for name, given, kind, shape in (
            ("images", images, torch.uint8, "[N, C, H, W]"),
            ("labels", labels, torch.int64, f"[{len(images)}]"),
        ):
            fits = isinstance(given, Tensor) and given.dtype == kind and given.dim() == shape.count(",") + 1
            if not fits or len(given) != len(images):
                size = list(getattr(given, "shape", ()))
                what = f"a {type(given).__name__} of {getattr(given, 'dtype', 'no type')} {size}"
                raise ValueError(f"the {name} are {what}, but a tensor {shape} of {kind} is needed: convert them.")
        super().__init__(labels, indices)
        self.images = images

    def images_at(self, indices: Tensor) -> Tensor:
        """A copy of the images with these indices, ``[N, C, H, W]`` uint8.

        Args:
            indices: indices of the images in the whole data set, ``[N]`` int64.
        """
        return self.images.index_select(0, indices)


class EpochSampler(DistributedSampler[Any]):
    """Shuffles a data set: a new order for each epoch, which depends on (seed, epoch) alone.

    Of R processes, process r takes the images r, r + R, r + 2R, ... of the order. The last ``len(dataset) % R`` images
    of an order are left out, so that all processes take equally many.

    Lightning calls ``set_epoch`` before each epoch. The base class is ``DistributedSampler`` because Lightning keeps
    such a sampler under DDP; it would replace any other sampler by its own.

    Example::

        >>> import torch
        >>> from project.data import ArrayDataset, EpochSampler
        >>> dataset = ArrayDataset(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), labels=torch.arange(6))
        >>> sampler = EpochSampler(dataset, seed=0)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(first) == sorted(sampler), first == list(sampler)
        (True, False)

    Args:
        dataset: the data set that is shuffled. Its ``set_epoch`` is called too.
        seed: seed of the run; any int.
        epoch: number of the epoch to begin with, 0 or more. A resumed run needs it, because its workers read the first
            batches before Lightning calls ``set_epoch``.
        num_replicas: number of processes R, at least 1.
        rank: number r of this process, 0 to R - 1.
        start: number of images of this process that the first epoch leaves out, 0 or more. A run that was stopped
            within an epoch has seen them already.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        seed: int = 0,
        epoch: int = 0,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.start = 0
        self.set_epoch(epoch)
        self.start = start

    def set_epoch(self, epoch: int) -> None:
        self.start = self.start if epoch == self.epoch else 0
        super().set_epoch(epoch)
        if isinstance(self.dataset, BatchDataset):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset) // self.num_replicas  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        num_images = len(self.dataset)  # type: ignore[arg-type]
        order = epoch_order(num_images, self.seed, self.epoch)[self.rank :: self.num_replicas]
        return iter(order[self.start : len(self)].tolist())


class PartSampler(DistributedSampler[Any]):
    """Distributes the images that a metric is measured on: process r of R takes the images r, r + R, r + 2R, ...

    Each image is used once, so metrics are exact. Lightning's own sampler repeats images until all processes have
    equally many.

    Args:
        dataset: a data set of at least R images.
        num_replicas: number of processes R, at least 1.
        rank: number r of this process, 0 to R - 1.
    """

    def __init__(self, dataset: BatchDataset, *, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch: a permutation of 0 to num_images - 1, ``[num_images]`` int64."""
    return BatchRandom(seed, epoch, torch.arange(num_images), ORDER).permutation()


def pass_through(batch: T) -> T:
    """The collate function for data sets that return whole batches: it returns its argument.

    It is a function of a module, not a lambda, so that the loader's workers can unpickle it.

    Args:
        batch: a batch of any type, as the data set returned it.
    """
    return batch
