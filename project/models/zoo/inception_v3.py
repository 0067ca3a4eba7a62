"""Inception v3: factorised convolutions, batch norm everywhere, 2.5 times the cost of batch-norm Inception.

Rethinking the Inception architecture for computer vision, Szegedy et al. 2015 (arXiv:1512.00567): table 1 (the net),
figures 5, 6, 7 and 10 (the blocks). The paper does not give most widths. Ours are those of the net that its authors
published, as in torchvision's ``inception_v3``: 23,834,568 parameters for 1000 classes of 3-channel images, and
torchvision's weights fit. Where the published net and the paper differ, we follow the net:

- The stem ends in a 1x1 (80), a 3x3 (192) and a pooling; the paper has three 3x3 (80, 192, 288).
- The middle branch on 35x35 is a 5x5.
- Four blocks, not five, work on 17x17 after the grid reduction.

The auxiliary classifier (section 4) is left out: ``forward`` returns logits only. torchvision's batch norm has
eps = 1e-3. To use its trained weights, give ``norm=partial(BatchNorm, eps=1e-3)``.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from project.models.inception_blocks import Branches
from project.models.layers import (
    BatchNorm,
    ConvFactory,
    DropoutFactory,
    GlobalAvgPool,
    MaxPool,
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
from project.models.zoo.inception_v3_blocks import (
    AsymmetricInception,
    ExpandedInception,
    FactorizedInception,
    GridReduction,
)

STEM = (32, 32, 64, 80, 192)
"""Widths of the stem's convolutions: 3x3/2, 3x3, padded 3x3, 1x1, 3x3."""
BLOCKS: dict[str, tuple[Callable[..., Branches], tuple[int, ...]]] = {
    "5b": (partial(FactorizedInception, kernel_size=5), (64, 48, 64, 64, 96, 32)),
    "5c": (partial(FactorizedInception, kernel_size=5), (64, 48, 64, 64, 96, 64)),
    "5d": (partial(FactorizedInception, kernel_size=5), (64, 48, 64, 64, 96, 64)),
    "6a": (GridReduction, (0, 384, 64, 96)),
    "6b": (AsymmetricInception, (192, 128, 192, 192, 192)),
    "6c": (AsymmetricInception, (192, 160, 192, 192, 192)),
    "6d": (AsymmetricInception, (192, 160, 192, 192, 192)),
    "6e": (AsymmetricInception, (192, 192, 192, 192, 192)),
    "7a": (partial(GridReduction, kernel_size=7), (192, 320, 192, 192)),
    "7b": (ExpandedInception, (320, 384, 384, 448, 384, 192)),
    "7c": (ExpandedInception, (320, 384, 384, 448, 384, 192)),
}
"""Class and widths of each block, in the order of the class's arguments. A width of 0 means that there is no layer."""


class InceptionV3(nn.Module):
    """Inception v3 (Szegedy et al. 2015, table 1): ``[N, C, H, W] -> [N, num_classes]``; 42 layers deep.

    The net was made for images of 299x299. Unpadded convolutions make the maps smaller, so a 75x75 image ends as a map
    of 1x1.

    Example::

        >>> import torch
        >>> from project.models import InceptionV3
        >>> net = InceptionV3(num_classes=10, image_shape=(3, 75, 75), width=0.25).eval()
        >>> net(torch.rand(1, 3, 75, 75)).shape
        torch.Size([1, 10])

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images, with sides of at least 75 pixels.
        width: factor on every channel count, above 0. The counts are rounded to multiples of 8.
        norm: factory of the norm, which takes the number of channels first.
        activation: factory of the activation, called without arguments.
        conv_dropout: dropout rate after each branch of a block, in [0, 1).
        conv_dropout_type: class of this dropout: ``nn.Dropout`` drops elements, ``nn.Dropout2d`` channels, ``DropPath``
            whole branches.
        fc_dropout: dropout rate before the linear layer, in [0, 1). The paper gives none; torchvision has 0.5.
        weight_init: function that fills the weight of a convolution or a linear layer in place.

    Raises:
        ValueError: if a side is under 75 pixels, if the width is not positive, or if a rate is outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        width: float = 1.0,
        norm: NormFactory = BatchNorm,
        activation: Callable[[], nn.Module] = ReLU,
        conv_dropout: float = 0.0,
        conv_dropout_type: DropoutFactory = nn.Dropout2d,
        fc_dropout: float = 0.5,
        weight_init: WeightInit = nn.init.kaiming_normal_,
    ) -> None:
        super().__init__()
        check_sides(image_shape, 75, self)
        self.image_shape = tuple(image_shape)
        conv = conv_factory(norm, activation)
        widths = scale_widths(STEM, width)
        self.stem = _stem(image_shape[0], widths, conv)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        channels = widths[-1]
        for name, (block_class, row) in BLOCKS.items():
            block = block_class(
                channels,
                *(count and scale_widths((count,), width)[0] for count in row),
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


def _stem(in_channels: int, widths: tuple[int, ...], conv: ConvFactory) -> nn.Sequential:
    """The layers before the first block: 299x299 -> 35x35. Only the third convolution and the 1x1 keep the size."""
    conv1, conv2, conv3, conv4, conv5 = widths
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=conv(in_channels, conv1, 3, 2, 0),
            conv2=conv(conv1, conv2, 3, 1, 0),
            conv3=conv(conv2, conv3, 3),
            pool3=MaxPool(3, stride=2),
            conv4=conv(conv3, conv4, 1),
            conv5=conv(conv4, conv5, 3, 1, 0),
            pool5=MaxPool(3, stride=2),
        )
    )
