"""Data in the place of Fashion-MNIST and MNIST, in their format."""

import struct
from pathlib import Path

import torch


def write_small_data(root: Path, num_train: int, num_test: int) -> None:
    """Write images of 28x28 pixels, easy to tell apart, as files of Fashion-MNIST and of MNIST.

    Args:
        root: data folder, as in ``PROJECT_DATA_DIR``.
        num_train: number of training images, at least 1.
        num_test: number of test images, at least 1.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 7, 7, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    for name in ("FashionMNIST", "MNIST"):
        folder = root / name / "raw"
        folder.mkdir(parents=True)
        for part, count in (("train", num_train), ("t10k", num_test)):
            labels = torch.arange(count) % 10
            noise = torch.rand(count, 28, 28, generator=generator)
            images = (255 * (0.7 * patterns[labels] + 0.3 * noise)).to(torch.uint8)
            head = struct.pack(">4I", 0x803, count, 28, 28)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
            head = struct.pack(">2I", 0x801, count)
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.to(torch.uint8).numpy().tobytes())
