"""Small images first: a convolutional net with global pooling learns most from them at a fraction of the cost.

Progressive resizing: Howard 2018 (fast.ai's DAWNBench entry); studied as EfficientNetV2's progressive learning,
Tan & Le 2021 (arXiv:2104.00298, sec. 4). Ours changes the size alone, not the strength of augmentation.
"""

from torch import Tensor
from torch.nn import functional as F

from project.data.random import BatchRandom
from project.data.transforms import BatchTransform


class ProgressiveResize(BatchTransform):
    """Shrinks the training images in early epochs: ``[N, C, H, W] -> [N, C, size, size]``.

    The net must take other sizes in training (``SmallInception`` does). Put it last: the others see whole images.

    Args:
        sizes: epoch -> side in pixels from that epoch on; before the first one, and at sizes of the image or above,
            images keep their size.

    Raises:
        ValueError: for a negative epoch or a size below 1.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        super().__init__()
        for epoch, size in sizes.items():
            if epoch < 0 or size < 1:
                raise ValueError(f"sizes has {epoch}: {size}, but it maps epochs from 0 to sides of 1 pixel or more.")
        self.sizes = dict(sizes)

    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        started = [epoch for epoch in self.sizes if epoch <= random.epoch]
        size = self.sizes[max(started)] if started else max(images.shape[-2:])
        if size >= max(images.shape[-2:]):
            return images
        return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"
