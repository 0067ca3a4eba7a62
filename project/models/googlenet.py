"""GoogLeNet and its batch-norm version.

Going deeper with convolutions, Szegedy et al. 2014 (arXiv:1409.4842): table 1 (widths), figure 3 (where the local
response normalisation sits). Batch normalization, Ioffe & Szegedy 2015 (arXiv:1502.03167): section 4.2.1 (what to
change with it).

The counts of this net are the arithmetic of the table's widths (weights without biases; K = 1024, M = 10^6). Nine of
the twelve cells "ops" (multiply-adds) equal the paper's to the last digit; of the cells "params" only 3x3, 3a and
linear do. The others do not follow from the paper's own widths:

- 7x7 convolution: 2.7K and 34M are those of a separable convolution of depth multiplier 8 (7*7*3*8 + 24*64 = 2,712
  weights), such as Ioffe & Szegedy have in their appendix. The 7x7 convolution that the table names has 9,408 weights
  and 118M multiply-adds.
- params, ours against printed: 3b 379/380, 4a 367/364, 4b 438/437, 4c 497.5/463, 4d 590.5/580, 4e 847/840,
  5a 1018/1072, 5b 1409/1388.
- ops, ours against printed: 4a 74/73, 5a 51/54.

The two auxiliary classifiers of section 5 (there for training only, not in table 1) are left out: ``forward`` returns
logits, and the authors found later that they do not speed up early training and act as a regulariser (Szegedy et al.
2015, arXiv:1512.00567, section 4).
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from project.models.inception_blocks import Inception
from project.models.layers import (
    BatchNorm,
    ConvFactory,
    DropoutFactory,
    GlobalAvgPool,
    MaxPool,
    NoNorm,
    NormFactory,
    ReLU,
    WeightInit,
    check_images,
    check_sides,
    conv_factory,
    init_weights_,
    make_dropout,
    scale_widths,
)

STEM = (64, 64, 192)
"""Widths of the 7x7, of the 1x1 before the 3x3, and of the 3x3."""
TABLE_1 = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Widths of the blocks: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj."""


class GoogLeNet(nn.Module):
    """Szegedy et al. 2014, table 1: ``[N, C, H, W] -> [N, num_classes]``; 22 layers with weights.

    Made for 224x224: the maps shrink 32 times before the global average, so a 32x32 image ends at 1x1.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of the images; sides of at least 32 pixels.
        width: multiplies every channel count (rounded to a multiple of 8).
        factorized: 5x5 as two 3x3 (Szegedy et al. 2015, figure 5), as in Ioffe & Szegedy's net; not in table 1.
        local_response_norm: normalise across channels around the second and third convolution (figure 3). The paper
            gives no constants; these are Krizhevsky et al. 2012, section 3.3, with k = 1 and alpha / n as in Caffe.
        norm: factory of the norm, number of channels first.
        activation: factory of the activation.
        conv_dropout: rate after each branch of a block, in [0, 1).
        conv_dropout_type: element (``nn.Dropout``), channel (``nn.Dropout2d``) or ``DropPath``.
        fc_dropout: rate before the linear layer, in [0, 1); 0.4 in the table.
        weight_init: fills the weights in place.

    Raises:
        ValueError: for a side under 32 pixels, a width that is not positive, a rate outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        width: float = 1.0,
        factorized: bool = False,
        local_response_norm: bool = True,
        norm: NormFactory = NoNorm,
        activation: Callable[[], nn.Module] = ReLU,
        conv_dropout: float = 0.0,
        conv_dropout_type: DropoutFactory = nn.Dropout2d,
        fc_dropout: float = 0.4,
        weight_init: WeightInit = nn.init.kaiming_normal_,
    ) -> None:
        super().__init__()
        check_sides(image_shape, 32, self)
        self.image_shape = tuple(image_shape)
        conv = conv_factory(norm, activation)
        widths = scale_widths(STEM, width)
        self.stem = _stem(image_shape[0], widths, conv, local_response_norm)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        channels = widths[-1]
        for name, row in TABLE_1.items():
            if name in ("4a", "5a"):
                blocks[f"pool_{name[0]}"] = _halve()
            block = Inception(
                channels,
                *scale_widths(row, width),
                factorized=factorized,
                conv=conv,
                dropout=lambda: make_dropout(conv_dropout_type, conv_dropout, "conv_dropout"),
            )
            blocks[f"inception_{name}"] = block
            channels = block.out_channels
        self.blocks = nn.Sequential(blocks)
        self.pool = GlobalAvgPool()
        self.dropout = make_dropout(nn.Dropout, fc_dropout, "fc_dropout")
        self.fc = nn.Linear(channels, num_classes)
        init_weights_(self, weight_init)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape, self)
        return self.fc(self.dropout(self.pool(self.blocks(self.stem(images)))))


class BNGoogLeNet(GoogLeNet):
    """GoogLeNet with batch norm after every convolution; widths, depth and kernels as in :class:`GoogLeNet`.

    Of Ioffe & Szegedy 2015, section 4.2.1, it takes what belongs to the net: local response normalisation and dropout
    removed. It is not the larger net of their appendix (separable first convolution, three blocks on 28x28, strided
    blocks instead of poolings); ``factorized=True`` gives their 5x5 as two 3x3.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of the images; sides of at least 32 pixels.
        local_response_norm: as in :class:`GoogLeNet`.
        norm: factory of the norm, number of channels first.
        fc_dropout: rate before the linear layer, in [0, 1).
        options: the other arguments of :class:`GoogLeNet`.

    Raises:
        ValueError: as :class:`GoogLeNet`.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        local_response_norm: bool = False,
        norm: NormFactory = BatchNorm,
        fc_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            image_shape,
            local_response_norm=local_response_norm,
            norm=norm,
            fc_dropout=fc_dropout,
            **options,
        )


def _stem(in_channels: int, widths: tuple[int, ...], conv: ConvFactory, local_response_norm: bool) -> nn.Sequential:
    """Figure 3, bottom up to the first block: 224x224 -> 28x28."""
    conv1, reduce2, conv2 = widths
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = conv(in_channels, conv1, 7, 2)
    layers["pool1"] = _halve()
    if local_response_norm:
        layers["norm1"] = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
    layers["conv2_reduce"] = conv(conv1, reduce2, 1)
    layers["conv2"] = conv(reduce2, conv2, 3)
    if local_response_norm:
        layers["norm2"] = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
    layers["pool2"] = _halve()
    return nn.Sequential(layers)


def _halve() -> MaxPool:
    """3x3 max pooling of stride 2; windows hang over the right and lower edge, so that even sides are halved."""
    return MaxPool(3, stride=2, ceil_mode=True)
