"""Data modules, data sets and batched augmentation."""

from project.data.array_dataset import ArrayDataset, BatchDataset, EpochSampler, pass_through
from project.data.datamodule import ImageDataModule
from project.data.digits import Digits
from project.data.erasing import Cutout, RandomErasing
from project.data.image_files import ImageFiles, decode_image
from project.data.image_folder import ImageFolder
from project.data.image_paths import find_images
from project.data.mix import BatchMix, CutMix, MixUp
from project.data.random import BatchRandom
from project.data.random_resized_crop import RandomResizedCrop
from project.data.split import stratified_split
from project.data.transforms import BatchTransform, HorizontalFlip, Normalize, PadCrop, RandomAffine
from project.frame.rooms import lazily

_HOMES = {
    "CIFAR10": "project.data.sets.cifar",
    "CIFAR100": "project.data.sets.cifar",
    "FashionMNIST": "project.data.sets.mnist",
    "KMNIST": "project.data.sets.mnist",
    "MNIST": "project.data.sets.mnist",
}
"""The modules of the published data sets. Each is imported when its name is first used."""

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "KMNIST",
    "MNIST",
    "ArrayDataset",
    "BatchDataset",
    "BatchMix",
    "BatchRandom",
    "BatchTransform",
    "CutMix",
    "Cutout",
    "Digits",
    "EpochSampler",
    "FashionMNIST",
    "HorizontalFlip",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolder",
    "MixUp",
    "Normalize",
    "PadCrop",
    "RandomAffine",
    "RandomErasing",
    "RandomResizedCrop",
    "decode_image",
    "find_images",
    "pass_through",
    "stratified_split",
]
__getattr__ = lazily(_HOMES)
