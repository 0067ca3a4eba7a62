"""GoogLeNet and its batch-norm version.

Going deeper with convolutions, Szegedy et al. 2014 (arXiv:1409.4842): table 1 (widths), figure 3 (place of the local
response normalisation). Batch normalization, Ioffe & Szegedy 2015 (arXiv:1502.03167): section 4.2.1 (changes of the net
for batch norm).

The numbers of weights and multiply-adds of this net follow from the widths in the paper's table (weights without
biases; K = 1024, M = 10^6). They differ from some numbers that the table prints. In the column "ops" (multiply-adds),
nine of the twelve cells are equal to the last digit. In the column "params", only the cells 3x3, 3a and linear are. The
other cells do not follow from the paper's own widths:

- 7x7 convolution: the printed 2.7K and 34M are those of a separable convolution of depth multiplier 8
  (7*7*3*8 + 24*64 = 2,712 weights), as in the appendix of Ioffe & Szegedy. The 7x7 convolution that the table names has
  9,408 weights and 118M multiply-adds.
- params, ours against printed: 3b 379/380, 4a 367/364, 4b 438/437, 4c 497.5/463, 4d 590.5/580, 4e 847/840,
  5a 1018/1072, 5b 1409/1388.
- ops, ours against printed: 4a 74/73, 5a 51/54.

The two auxiliary classifiers of section 5 are left out; they serve training only and are not in table 1. ``forward``
returns logits only. The authors found later that these classifiers do not speed up early training and act as a
regulariser (Szegedy et al. 2015, arXiv:1512.00567, section 4).
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
"""Widths of the 7x7 convolution, of the 1x1 before the 3x3, and of the 3x3."""
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
"""Widths of the blocks, by the columns of the table: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj."""


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al. 2014, table 1): ``[N, C, H, W] -> [N, num_classes]``; 22 layers with weights.

    The net was made for images of 224x224. The maps become 32 times smaller before the global average, so a 32x32 image
    ends as a map of 1x1.

    Example::

        data:
          class_path: project.data.CIFAR10
        model:
          net:
            class_path: project.models.GoogLeNet
            init_args: {width: 0.5, fc_dropout: 0.4}

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images, with sides of at least 32 pixels.
        width: factor on every channel count, above 0. The counts are rounded to multiples of 8.
        factorized: whether two 3x3 convolutions replace each 5x5 (Szegedy et al. 2015, figure 5), as in the net of
            Ioffe & Szegedy. Table 1 has 5x5.
        local_response_norm: whether to normalise across channels around the second and third convolution (figure 3).
            The paper gives no constants; ours are those of Krizhevsky et al. 2012, section 3.3, with k = 1 and
            alpha / n as in Caffe.
        norm: factory of the norm, which takes the number of channels first.
        activation: factory of the activation, called without arguments.
        conv_dropout: dropout rate after each branch of a block, in [0, 1).
        conv_dropout_type: class of this dropout: ``nn.Dropout`` drops elements, ``nn.Dropout2d`` channels, ``DropPath``
            whole branches.
        fc_dropout: dropout rate before the linear layer, in [0, 1); 0.4 in the paper's table.
        weight_init: function that fills the weight of a convolution or a linear layer in place.

    Raises:
        ValueError: if a side is under 32 pixels, if the width is not positive, or if a rate is outside [0, 1).
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
    """GoogLeNet with batch norm after every convolution; widths, depth and kernel sizes are those of GoogLeNet.

    It follows the changes of the net in Ioffe & Szegedy 2015, section 4.2.1: no local response normalisation and no
    dropout. It is not the larger net of their appendix, which has a separable first convolution, three blocks on 28x28,
    and strided blocks instead of poolings. ``factorized=True`` replaces each 5x5 by two 3x3, as they do.

    Example::

        data:
          class_path: project.data.CIFAR100
        model:
          net:
            class_path: project.models.BNGoogLeNet
            init_args: {width: 0.5, factorized: true}

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images, with sides of at least 32 pixels.
        local_response_norm: whether to normalise across channels around the second and third convolution.
        norm: factory of the norm, which takes the number of channels first.
        fc_dropout: dropout rate before the linear layer, in [0, 1).
        options: the other arguments of :class:`GoogLeNet`, such as ``width``.

    Raises:
        ValueError: if a side is under 32 pixels, if the width is not positive, or if a rate is outside [0, 1).
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
    """The layers of figure 3 before the first block: 224x224 -> 28x28."""
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
    """3x3 max pooling of stride 2. The last windows reach over the right and lower edge, so even sides are halved."""
    return MaxPool(3, stride=2, ceil_mode=True)
