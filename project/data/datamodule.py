"""The base class of all data modules: uint8 batches from memory, augmented as a whole on the training device.

The loader yields raw batches: uint8 images, labels, and the indices of the images. Lightning calls
:meth:`ImageDataModule.on_after_batch_transfer` when the batch is on the device; this method makes normalised float
images of them. Augmentation depends on (seed, epoch, index of the image) alone. A resumed run therefore sees the same
images as a run that was never stopped, with any number of workers or processes. MixUp and CutMix take an image's
partner from the batch of all processes together.
"""

import logging
import os
import warnings
from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from project.data.array_dataset import (
    ArrayDataset,
    Batch,
    BatchDataset,
    EpochSampler,
    PartSampler,
    epoch_order,
    pass_through,
)
from project.data.mix import BatchMix
from project.data.random import BatchRandom
from project.data.split import check_fraction, stratified_split
from project.data.transforms import BatchTransform, Normalize
from project.frame.paths import Paths
from project.learning.whole_batch import gather

log = logging.getLogger(__name__)


class ImageDataModule(LightningDataModule):
    """Base class of the data modules: images with class labels.

    A subclass implements :meth:`load` and sets ``class_names``, ``image_shape``, ``mean`` and ``std``.

    Example::

        >>> import torch
        >>> from project.data import ImageDataModule
        >>> class Noise(ImageDataModule):
        ...     class_names, image_shape, mean, std = ("a", "b"), (1, 8, 8), (0.5,), (0.29,)
        ...     def load(self, train):
        ...         return torch.randint(0, 256, (120, 1, 8, 8), dtype=torch.uint8), torch.arange(120) % 2
        >>> data = Noise(batch_size=10, val_fraction=1 / 12)
        >>> data.setup("fit")
        >>> len(data.train_data), len(data.val_data)
        (110, 10)

    Args:
        batch_size: number of training images per step and process, at least 1. A last batch that is not full is
            dropped.
        eval_batch_size: number of images per batch in validation, test and prediction, at least 1.
        val_fraction: share of the training images that is held out for validation, in [0, 1). With 0 the run trains on
            all images and has no validation.
        augment: transforms of the training images, applied in this order. ``None`` means no augmentation.
        mix: MixUp or CutMix of the training images, which makes soft targets. ``None`` means no mixing.
        num_workers: number of extra processes that read images, 0 or more. 0 is fastest for data in memory.
        data_dir: folder of the data sets. ``None`` takes the environment variable ``PROJECT_DATA_DIR``, or else
            ``data``.
        split_seed: seed of the validation split; any int.
        seed: seed of the order and of the augmentation; any int. ``None`` takes the run's (``seed_everything``).

    Raises:
        ValueError: if a number is outside its range.
    """

    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    image_shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    mean: tuple[float, ...]
    """Mean of each channel over the training images, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each channel over the training images, for pixels in [0, 1]."""

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        val_fraction: float = 1 / 12,
        augment: list[BatchTransform] | None = None,
        mix: BatchMix | None = None,
        num_workers: int = 0,
        data_dir: str | None = None,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but a batch holds at least one image: give 1 or more.")
        check_fraction("val_fraction", val_fraction)
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, but it counts processes: give 0 (none extra) or more.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.augment = list(augment or [])
        self.mix = mix
        self.num_workers = num_workers
        self.data_dir = Paths(data_dir).data
        self.split_seed = split_seed
        self.seed = seed
        self.train_data: BatchDataset | None = None
        self.val_data: BatchDataset | None = None
        self.test_data: BatchDataset | None = None
        self._normalize: Normalize | None = None
        self._stopped_at: tuple[int, int] | None = None  # the epoch and its batches that a stopped run has trained

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def run_seed(self) -> int:
        """The argument ``seed``; if it is ``None``, the seed of ``seed_everything``; if there is none, 0."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    @abstractmethod
    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """The images ``[N, C, H, W]`` uint8 and labels ``[N]`` int64 of one part of the data set.

        Args:
            train: whether to load the training images (with validation) or the test images.
        """

    def load_dataset(self, train: bool) -> BatchDataset:
        """One part of the data set as an object. A subclass that does not keep its images in memory overrides this.

        Args:
            train: whether to load the training images (with validation) or the test images.
        """
        loaded = self.load(train)
        if not isinstance(loaded, tuple | list) or len(loaded) != 2:
            name = type(self).__name__
            raise ValueError(f"{name}.load gives a {type(loaded).__name__}: let it return images and labels.")
        return ArrayDataset(*loaded)

    def split(self, dataset: BatchDataset) -> tuple[BatchDataset, BatchDataset]:
        """Split the training images into a part for training and a part for validation.

        Args:
            dataset: all training images, as :meth:`load_dataset` returned them.
        """
        train, val = stratified_split(dataset.labels, self.val_fraction, self.split_seed)
        return dataset.subset(train), dataset.subset(val)

    def setup(self, stage: str | None = None) -> None:
        """Load the data that ``stage`` needs, unless they are loaded already.

        Raises:
            ValueError: if the data are missing or damaged, or if a batch is larger than the training set.
        """
        if stage in ("fit", "validate", None) and self.train_data is None:
            self.train_data, self.val_data = self.split(self._checked(self.load_dataset(train=True)))
            self._tell_absent(self.train_data, "training")
            self._tell_absent(self.val_data, "validation")
        if stage in ("test", "predict", None) and self.test_data is None:
            self.test_data = self._checked(self.load_dataset(train=False))
            self._tell_absent(self.test_data, "test")
        if stage in ("fit", None):
            self._check_batch_size()

    def _checked(self, data: BatchDataset) -> BatchDataset:
        """The data set, if its labels and the shape of its images are those that the class promises."""
        name, shape = type(self).__name__, tuple(self.image_shape)
        if isinstance(data, ArrayDataset) and data.images.shape[1:] != shape:
            given = tuple(data.images.shape[1:])
            raise ValueError(f"{name} has images {given}, but its image_shape is {shape}: correct one of them.")
        least, most = (int(data.labels.min()), int(data.labels.max())) if len(data) else (0, 0)
        if least < 0 or most >= self.num_classes:
            raise ValueError(
                f"{name} has labels {least} to {most}, but {self.num_classes} class_names: the labels must be 0 to "
                f"{self.num_classes - 1}."
            )
        return data

    def count_test_images(self) -> int:
        """The number of test images. This loads them, as the test after ``fit`` does."""
        self.setup("test")
        assert self.test_data is not None
        return len(self.test_data)

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.train_data is not None, "call setup('fit') first"
        trainer = self.trainer
        if trainer is not None and getattr(trainer, "overfit_batches", 0) > 0:
            # Every epoch uses the same few images. The order mixes the classes.
            order = epoch_order(len(self.train_data), self.run_seed, 0)
            return self._loader(self.train_data.subset(order), self.batch_size, drop_last=True)
        epoch, batches = self._stopped_at or (trainer.current_epoch if trainer is not None else 0, 0)
        self._stopped_at = None
        sampler = EpochSampler(
            self.train_data,
            self.run_seed,
            epoch=epoch,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            start=batches * self.batch_size,
        )
        return self._loader(self.train_data, self.batch_size, sampler, drop_last=True)

    def state_dict(self) -> dict[str, Any]:
        """The place within an epoch, for a checkpoint that is saved there; empty at the end of an epoch."""
        loop = self.trainer.fit_loop if self.trainer is not None else None
        if loop is None or loop.epoch_loop._num_ready_batches_reached():
            return {}
        epoch, batches = (p.current.processed for p in (loop.epoch_progress, loop.epoch_loop.batch_progress))  # type: ignore[attr-defined]
        return {"epoch": epoch, "batches": batches, **self._steps()} if batches else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin at the place within an epoch that a checkpoint was saved at.

        Args:
            state_dict: dictionary that :meth:`state_dict` returned.

        Raises:
            ValueError: if an epoch has other batches now, so that the rest of the epoch cannot be found.
        """
        if not state_dict:
            return
        for name, now in self._steps().items():
            if now != state_dict[name]:
                raise ValueError(
                    f"the checkpoint was saved after batch {state_dict['batches']} of epoch {state_dict['epoch'] + 1} "
                    f"with {name} {state_dict[name]}, but {name} is {now}: resume with {state_dict[name]}, or give the "
                    "checkpoint of a whole epoch."
                )
        self._stopped_at = state_dict["epoch"], state_dict["batches"]
        # The sampler finds the rest of the epoch, but Lightning looks for a loader with a state.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")

    def _steps(self) -> dict[str, int]:
        """What an epoch's batches depend on."""
        trainer, data = self.trainer, self.train_data
        assert trainer is not None and data is not None
        counts = {"batch_size": self.batch_size, "training images": len(data), "devices": trainer.world_size}
        return {**counts, "accumulate_grad_batches": trainer.accumulate_grad_batches}

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """No loader (an empty list) when nothing is held out."""
        assert self.val_data is not None, "call setup('fit') or setup('validate') first"
        if len(self.val_data):
            return self._loader(self.val_data, self.eval_batch_size, self._part(self.val_data, "validation"))
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # it is the intention
        return []

    def test_dataloader(self) -> DataLoader[Batch]:
        assert self.test_data is not None, "call setup('test') first"
        if not len(self.test_data):
            raise ValueError("the test set holds no images: hold some out, or give them a folder test.")
        return self._loader(self.test_data, self.eval_batch_size, self._part(self.test_data, "test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return self.test_dataloader()

    def measured_images(self, split: str) -> DataLoader[Batch]:
        """All images of one part, for one process that measures alone.

        Args:
            split: name of the part, ``"val"`` or ``"test"``.
        """
        data = self.test_data if split == "test" else self.val_data
        assert data is not None, "call setup first"
        return self._loader(data, self.eval_batch_size)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Some training images ``[count, C, H, W]`` and their labels, normalised but not augmented.

        Args:
            count: number of images, at least 1, spread evenly over the training set. A smaller set gives all its
                images.
        """
        assert self.train_data is not None, "call setup('fit') first"
        count = min(count, len(self.train_data))
        positions = torch.linspace(0, len(self.train_data) - 1, count).long().tolist()
        images, labels, _ = self.train_data.__getitems__(positions)
        return self._in_precision(self.normalize(images.float().div_(255))), labels

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Make normalised float images and targets of a raw batch.

        Images of several channels are channels-last in memory. In training the images are also augmented. Targets are
        class numbers ``[N]`` int64, or distributions ``[N, K]`` float after MixUp or CutMix.
        """
        images, targets, indices = batch
        images = images.float().div_(255)
        trainer = self.trainer
        if trainer is None or not trainer.training or not len(images):
            return self._for_net(self.normalize(images)), targets
        random = BatchRandom(self.run_seed, trainer.current_epoch, indices)
        for transform in self.augment:
            shape, images = images.shape, transform(images, random)
            if getattr(images, "shape", None) != shape:
                name, given = type(transform).__name__, list(getattr(images, "shape", ())) or type(images).__name__
                raise ValueError(f"augment has {name}, which makes {given} of images {list(shape)}: keep their shape.")
        images = self.normalize(images)
        if self.mix is not None:
            images, targets = self._mixed(self.mix, images, targets, random)
        return self._for_net(images), targets

    def _mixed(self, mix: BatchMix, images: Tensor, labels: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor]:
        """Each process mixes the batch of all processes and keeps its own part.

        So the partners are the same as in a run of one process.
        """
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return mix(images, labels, random, self.num_classes)

        first = trainer.global_rank * len(images)
        own = slice(first, first + len(images))
        images, targets = mix(gather(images), gather(labels), random.over(gather), self.num_classes)
        return images[own], targets[own]

    def _for_net(self, images: Tensor) -> Tensor:
        images = self._in_precision(images)
        return images.contiguous(memory_format=torch.channels_last) if images.shape[1] > 1 else images

    def _in_precision(self, images: Tensor) -> Tensor:
        """The images in the type of the net's weights, which is not float32 under ``64-true`` or ``bf16-true``."""
        module = getattr(self.trainer, "lightning_module", None)
        return images if module is None else images.to(module.dtype)

    def normalize(self, images: Tensor) -> Tensor:
        """``(images - mean) / std`` for each channel.

        Args:
            images: images ``[N, C, H, W]`` float with pixels in [0, 1].
        """
        if self._normalize is None:
            self._normalize = Normalize(self.mean, self.std)
        if self._normalize.scale.device != images.device:
            self._normalize.to(images.device)
        return self._normalize(images)

    def _part(self, dataset: BatchDataset, name: str) -> PartSampler | None:
        """The sampler of this process's share of the images to measure on; ``None`` if there is only one process."""
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return None
        size = trainer.world_size
        if len(dataset) < size:
            raise ValueError(
                f"the {name} set holds {len(dataset)} images for {size} processes: set trainer.devices to 1, or hold "
                "out more images (val_fraction)."
            )
        return PartSampler(dataset, num_replicas=size, rank=trainer.global_rank)

    def _loader(
        self,
        dataset: BatchDataset,
        batch_size: int,
        sampler: EpochSampler | PartSampler | None = None,
        drop_last: bool = False,
    ) -> DataLoader[Batch]:
        if self.num_workers == 0 and isinstance(dataset, ArrayDataset):
            # Lightning advises to add workers, but workers do not make a gather from memory faster.
            warnings.filterwarnings("ignore", r"The '\w+' does not have many workers which may be a bottleneck")
        return DataLoader(  # keywords, because Lightning makes it again for prediction, with another batch sampler
            dataset=dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=pass_through,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
        )

    def _tell_absent(self, data: BatchDataset, name: str) -> None:
        present = set(data.labels.unique().tolist())
        absent = [class_name for label, class_name in enumerate(self.class_names) if label not in present]
        if absent and present:
            listed = ", ".join(absent[:10]) + (", …" if len(absent) > 10 else "")
            log.warning("the %s set holds no images of %s: add some, or hold another share out", name, listed)

    def _check_batch_size(self) -> None:
        assert self.train_data is not None
        num_processes = self.trainer.world_size if self.trainer is not None else 1
        share = len(self.train_data) // num_processes
        if self.batch_size > share:
            among = f", {share} for each of {num_processes} processes" if num_processes > 1 else ""
            raise ValueError(
                f"batch_size is {self.batch_size}, but the training set holds {len(self.train_data)} images{among}: "
                f"give a batch_size of at most {share}."
            )
