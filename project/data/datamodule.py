"""The base of all data modules: uint8 batches from memory, augmented as a whole on the training device.

The loader yields raw batches (uint8 images, labels, numbers of the images);
:meth:`ImageDataModule.on_after_batch_transfer`, which Lightning calls once the batch is on the device, makes
normalised float images of them. Augmentation depends on (seed, epoch, number of the image) alone, so a resumed run
sees the same images as one never stopped, at any number of workers or processes. A mix takes its partners from the
batch of all processes.
"""

import os
import warnings
from abc import abstractmethod

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


class ImageDataModule(LightningDataModule):
    """Images with class labels; a subclass implements :meth:`load` and names classes, shape, mean and std.

    Args:
        batch_size: training images per step (and process); a last batch that is not full is dropped.
        eval_batch_size: images per batch of validation, test and prediction.
        val_fraction: share of the training images held out for validation, in [0, 1); 0 trains on all, without
        validation.
        augment: transforms of the training images, in this order.
        mix: MixUp or CutMix of the training images; makes soft targets.
        num_workers: processes that read; 0 is fastest for data in memory.
        data_dir: folder of the data sets; ``None`` takes ``PROJECT_DATA_DIR``, else ``data``.
        split_seed: which of the possible validation splits.
        seed: of order and augmentation; ``None`` takes the run's (``seed_everything``).

    Raises:
        ValueError: for numbers outside their range.
    """

    class_names: tuple[str, ...]
    """Names of the classes, by label."""
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    mean: tuple[float, ...]
    """Per channel, of the training images' pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, likewise."""

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

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def run_seed(self) -> int:
        """``seed``, else the one ``seed_everything`` left in the environment, else 0."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    @abstractmethod
    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """The training or test images ``[N, C, H, W]`` uint8 and labels ``[N]`` int64."""

    def load_dataset(self, train: bool) -> BatchDataset:
        """The training (with validation) or test images as a data set."""
        return ArrayDataset(*self.load(train))

    def split(self, dataset: BatchDataset) -> tuple[BatchDataset, BatchDataset]:
        """Parts for training and for validation."""
        train, val = stratified_split(dataset.labels, self.val_fraction, self.split_seed)
        return dataset.subset(train), dataset.subset(val)

    def setup(self, stage: str | None = None) -> None:
        """Load what ``stage`` needs, once.

        Raises:
            ValueError: when the data are missing or damaged, or a batch is larger than the training set.
        """
        if stage in ("fit", "validate", None) and self.train_data is None:
            self.train_data, self.val_data = self.split(self.load_dataset(train=True))
        if stage in ("test", "predict", None) and self.test_data is None:
            self.test_data = self.load_dataset(train=False)
        if stage in ("fit", None):
            self._check_batch_size()

    def count_test_images(self) -> int:
        """The number of test images; loads them, as the test after a fit does."""
        self.setup("test")
        assert self.test_data is not None
        return len(self.test_data)

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.train_data is not None, "call setup('fit') first"
        trainer = self.trainer
        if trainer is not None and getattr(trainer, "overfit_batches", 0) > 0:
            # The same few images each epoch, in an order that mixes the classes.
            order = epoch_order(len(self.train_data), self.run_seed, 0)
            return self._loader(self.train_data.subset(order), self.batch_size, drop_last=True)
        sampler = EpochSampler(
            self.train_data,
            self.run_seed,
            epoch=trainer.current_epoch if trainer is not None else 0,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
        )
        return self._loader(self.train_data, self.batch_size, sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """No loader (an empty list) when nothing is held out."""
        assert self.val_data is not None, "call setup('fit') or setup('validate') first"
        if len(self.val_data):
            return self._loader(self.val_data, self.eval_batch_size, self._part(self.val_data, "validation"))
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # it is the intention
        return []

    def test_dataloader(self) -> DataLoader[Batch]:
        assert self.test_data is not None, "call setup('test') first"
        return self._loader(self.test_data, self.eval_batch_size, self._part(self.test_data, "test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return self.test_dataloader()

    def measured_images(self, split: str) -> DataLoader[Batch]:
        """All ``val`` or ``test`` images, for one process that measures alone."""
        data = self.test_data if split == "test" else self.val_data
        assert data is not None, "call setup first"
        return self._loader(data, self.eval_batch_size)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """At most ``count`` training images, spread over the whole set, normalised and not augmented, and labels."""
        assert self.train_data is not None, "call setup('fit') first"
        count = min(count, len(self.train_data))
        positions = torch.linspace(0, len(self.train_data) - 1, count).long().tolist()
        images, labels, _ = self.train_data.__getitems__(positions)
        return self._in_precision(self.normalize(images.float().div_(255))), labels

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Raw batch -> float images, normalised, channels-last in memory when coloured, and targets.

        In training also augmented; targets are int64 ``[N]``, or float ``[N, K]`` after a mix.
        """
        images, targets, indices = batch
        images = images.float().div_(255)
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return self._for_net(self.normalize(images)), targets
        random = BatchRandom(self.run_seed, trainer.current_epoch, indices)
        for transform in self.augment:
            images = transform(images, random)
        images = self.normalize(images)
        if self.mix is not None:
            images, targets = self._mixed(self.mix, images, targets, random)
        return self._for_net(images), targets

    def _mixed(self, mix: BatchMix, images: Tensor, labels: Tensor, random: BatchRandom) -> tuple[Tensor, Tensor]:
        """Of several processes each mixes the whole batch and takes its part, so that partners are those of one."""
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
        """In the type of the net's weights (``64-true``, ``bf16-true``)."""
        module = getattr(self.trainer, "lightning_module", None)
        return images if module is None else images.to(module.dtype)

    def normalize(self, images: Tensor) -> Tensor:
        """``(images - mean) / std`` per channel, for images in [0, 1]."""
        if self._normalize is None:
            self._normalize = Normalize(self.mean, self.std)
        if self._normalize.scale.device != images.device:
            self._normalize.to(images.device)
        return self._normalize(images)

    def _part(self, dataset: BatchDataset, name: str) -> PartSampler | None:
        """This process's share of the images to measure on; all of them where there is one process."""
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
            # Lightning's advice to add workers does not hold for a gather from memory.
            warnings.filterwarnings("ignore", r"The '\w+' does not have many workers which may be a bottleneck")
        return DataLoader(  # by keyword: Lightning makes it anew for prediction with another batch sampler
            dataset=dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=pass_through,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
        )

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
