"""Data sets that answer with whole batches, and the sampler that shuffles them as a pure function of (seed, epoch).

``DataLoader`` hands all indices of a batch to ``__getitems__`` where a data set has it, so one gather from one uint8
tensor makes the batch, with no Python call per image; workers, samplers and distributed samplers work as ever.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from project.data.random import ORDER, BatchRandom

T = TypeVar("T")
Batch = tuple[Tensor, Tensor, Tensor]
"""Images ``[N, C, H, W]`` uint8, labels ``[N]`` int64, indices ``[N]`` int64 of the images in the whole data set."""


class BatchDataset(Dataset[Batch], ABC):
    """A data set of images, or a part of one, that is read batch by batch.

    Args:
        labels: ``[N]`` int64, of the whole data set.
        indices: which images belong to this part, in its order; ``None`` takes all.
    """

    def __init__(self, labels: Tensor, indices: Tensor | None = None) -> None:
        self.all_labels = labels
        self.indices = torch.arange(len(labels)) if indices is None else indices

    @property
    def labels(self) -> Tensor:
        """Labels of this part, ``[len(self)]``."""
        return self.all_labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        indices = self.indices[torch.as_tensor(positions)]
        return self.images_at(indices), self.all_labels[indices], indices

    def set_epoch(self, epoch: int) -> None:
        """Told by :class:`EpochSampler`; for data sets that crop at random while decoding."""

    @abstractmethod
    def images_at(self, indices: Tensor) -> Tensor:
        """The images with these numbers in the whole data set, ``[N, C, H, W]`` uint8."""

    @abstractmethod
    def subset(self, positions: Tensor) -> Self:
        """The part of this data set at ``positions``, in their order; images are shared, not copied."""


class ArrayDataset(BatchDataset):
    """Images in memory as one uint8 tensor.

    Args:
        images: ``[N, C, H, W]`` uint8.
        labels: ``[N]`` int64.
        indices: which images belong to this part; ``None`` takes all.
    """

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        assert images.dtype == torch.uint8 and images.dim() == 4, (images.dtype, images.shape)
        assert labels.dtype == torch.int64 and len(labels) == len(images), (labels.dtype, labels.shape)
        super().__init__(labels, indices)
        self.images = images

    def images_at(self, indices: Tensor) -> Tensor:
        return self.images.index_select(0, indices)

    def subset(self, positions: Tensor) -> Self:
        return type(self)(self.images, self.all_labels, self.indices[positions])


class EpochSampler(DistributedSampler[Any]):
    """A new order each epoch that depends on (seed, epoch) alone; process r of R takes every R-th image from the r-th.

    Lightning calls ``set_epoch`` before each epoch, and leaves a ``DistributedSampler`` in place under DDP, where it
    would replace any other by one of its own. The last ``len(dataset) % R`` images of an order are left out, so that
    all processes take equally many.

    Args:
        dataset: what to shuffle.
        seed: the run's seed.
        epoch: where to start; a resumed run's workers fetch before Lightning tells the epoch.
        num_replicas: number of processes R.
        rank: this process r.
    """

    def __init__(
        self, dataset: BatchDataset, seed: int = 0, epoch: int = 0, *, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if isinstance(self.dataset, BatchDataset):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset) // self.num_replicas  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        num_images = len(self.dataset)  # type: ignore[arg-type]
        order = epoch_order(num_images, self.seed, self.epoch)[self.rank :: self.num_replicas]
        return iter(order[: len(self)].tolist())


class PartSampler(DistributedSampler[Any]):
    """Process r of R looks at every R-th image from the r-th, in order: each image once, so that metrics are exact.

    Lightning's own choice repeats images until all processes have equally many.

    Args:
        dataset: of at least R images.
        num_replicas: number of processes R.
        rank: this process r.
    """

    def __init__(self, dataset: BatchDataset, *, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of 0..num_images-1, ``[num_images]`` int64."""
    return BatchRandom(seed, epoch, torch.arange(num_images), ORDER).permutation()


def pass_through(batch: T) -> T:
    """Collate function for data sets that answer with whole batches; importable, so that workers can unpickle it."""
    return batch
