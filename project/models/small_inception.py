"""A small Inception for images of 8 to 64 pixels: the template's default net.

The block is figure 2b of Szegedy et al. 2014 (arXiv:1409.4842) with two 3x3 in the place of the 5x5 (Szegedy et al.
2015, arXiv:1512.00567, figure 5). A stem of plain convolutions comes first, then the blocks, then global average
pooling, dropout and one linear layer, as in both papers.

The poolings are ours. A max pooling after a convolution of the stem halves the image if it has more than 16 pixels a
side. A max pooling before a stage halves it if it has more than 4. If the stem's last convolution has no pooling of its
own, it gets the one before the first stage; its norm, activation and pooling are then one operation. No convolution has
a stride, because every pixel of a small image matters. Widths are multiples of 8, which fills the processor's vectors.
"""

from collections.abc import Callable

from torch import Tensor, nn

from project.frame.rooms import optional
from project.models.inception_blocks import Inception
from project.models.layers import (
    BatchNorm,
    DropoutFactory,
    GlobalAvgPool,
    MaxPool,
    NormFactory,
    ReLU,
    WeightInit,
    check_images,
    conv_factory,
    init_weights_,
    make_dropout,
    scale_channels,
)


class SmallInception(nn.Module):
    """Stem, stages of Inception blocks, global average pooling, linear: ``[N, C, H, W] -> [N, num_classes]``.

    Example::

        model:
          net:
            class_path: project.models.SmallInception
            init_args: {width: 0.75, stages: [[128], [256, 256]], fc_dropout: 0.2}

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images, with sides of 8 to 64 pixels.
        width: factor on every channel count, above 0. The counts are rounded to multiples of 8.
        stem: numbers of output channels of the stem's 3x3 convolutions, before ``width`` is applied.
        stages: numbers of output channels of the Inception blocks, one list per stage, before ``width`` is applied.
        pool_first: whether to pool before the first stage too. Without this pooling the first stage works on the stem's
            full map.
        norm: factory of the norm, which takes the number of channels first.
        activation: factory of the activation, called without arguments.
        conv_dropout: dropout rate after each branch of a block, in [0, 1).
        conv_dropout_type: class of this dropout: ``nn.Dropout`` drops elements, ``nn.Dropout2d`` channels, ``DropPath``
            whole branches.
        fc_dropout: dropout rate before the linear layer, in [0, 1).
        weight_init: function that fills the weight of a convolution or a linear layer in place.

    Raises:
        ValueError: if a side is outside 8 to 64 pixels, if the width is not positive, or if a rate is outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        width: float = 1.0,
        stem: tuple[int, ...] = (32, 64),
        stages: tuple[tuple[int, ...], ...] = ((192,), (384,)),
        pool_first: bool = True,
        norm: NormFactory = BatchNorm,
        activation: Callable[[], nn.Module] = ReLU,
        conv_dropout: float = 0.0,
        conv_dropout_type: DropoutFactory = nn.Dropout2d,
        fc_dropout: float = 0.0,
        weight_init: WeightInit = nn.init.kaiming_normal_,
    ) -> None:
        super().__init__()
        channels, height, image_width = image_shape
        side = max(height, image_width)
        if not 8 <= min(height, image_width) <= side <= 64:
            other = "another net" if optional("models.zoo") is None else "project.models.GoogLeNet"
            raise ValueError(
                f"image_shape is {tuple(image_shape)}, but SmallInception takes sides of 8 to 64 pixels: "
                f"resize the images (data.image_size) or choose {other}."
            )
        if width <= 0:
            raise ValueError(f"width is {width}, but it multiplies channel counts: choose a number above 0.")
        self.image_shape = tuple(image_shape)
        conv = conv_factory(norm, activation)

        pool_first = pool_first and len(stages) > 0
        stem_pools = False  # whether the stem's last convolution has the pooling before the first stage
        self.stem = nn.Sequential()
        for number, wished in enumerate(stem, 1):
            stem_pools = pool_first and number == len(stem) and 4 < side <= 16
            pool = _max_pool if side > 16 or stem_pools else None
            out_channels = scale_channels(wished, width)
            self.stem.append(conv(channels, out_channels, 3, pool=pool))
            channels, side = out_channels, -(-side // 2) if pool else side
        self.blocks = nn.Sequential()
        for number, stage in enumerate(stages):
            if stem_pools and not number:
                self.blocks.append(nn.Identity())  # so that the blocks' names do not depend on the image's size
            elif side > 4 and (number or pool_first):
                self.blocks.append(_max_pool())
                side = -(-side // 2)
            for wished in stage:
                block = Inception(
                    channels,
                    *_widths(scale_channels(wished, width)),
                    factorized=True,
                    conv=conv,
                    dropout=lambda: make_dropout(conv_dropout_type, conv_dropout, "conv_dropout"),
                )
                self.blocks.append(block)
                channels = block.out_channels
        self.pool = GlobalAvgPool()
        self.dropout = make_dropout(nn.Dropout, fc_dropout, "fc_dropout")
        self.fc = nn.Linear(channels, num_classes)
        init_weights_(self, weight_init)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape, self)
        return self.fc(self.dropout(self.pool(self.blocks(self.stem(images)))))


def _max_pool() -> nn.Module:
    return MaxPool(2, ceil_mode=True)


def _widths(channels: int) -> tuple[int, int, int, int, int, int]:
    """The widths of a block, in the order of table 1. The branches give 1/4, 3/8, 1/4 and the rest of ``channels``."""
    quarter, eighth = scale_channels(channels, 1 / 4), scale_channels(channels, 1 / 8)
    conv3x3 = max(8, int(channels * 3 / 8) // 8 * 8)
    return quarter, quarter, conv3x3, eighth, quarter, max(8, channels - 2 * quarter - conv3x3)
