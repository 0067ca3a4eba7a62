"""A small Inception for images of 8 to 64 pixels: the template's default net.

The block is figure 2b of Szegedy et al. 2014 (arXiv:1409.4842) with the 5x5 as two 3x3 (Szegedy et al. 2015, arXiv:1512.00567,
figure 5) and the head that of both papers: global average pooling, dropout, one linear layer. What is ours is the scale: the
stem halves the image until at most 16 pixels are left, then come two stages of blocks with a max pooling between.
"""

from collections.abc import Callable

from torch import Tensor, nn

from project.models.inception_blocks import Inception
from project.models.layers import (
    BatchNorm,
    DropoutFactory,
    GlobalAvgPool,
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
    """Stem, two stages of Inception blocks, global average pooling, linear: ``[N, C, H, W] -> [N, num_classes]``.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of the images; sides from 8 to 64 pixels.
        width: multiplies every channel count (rounded to a multiple of 8).
        stem_channels: channels after the stem.
        stages: output channels of the blocks, one list per stage.
        norm: factory of the norm, number of channels first.
        activation: factory of the activation.
        conv_dropout: rate after each branch of a block, in [0, 1).
        conv_dropout_type: element (``nn.Dropout``), channel (``nn.Dropout2d``) or ``DropPath``.
        fc_dropout: rate before the linear layer, in [0, 1).
        weight_init: fills the weights in place.

    Raises:
        ValueError: for an image outside 8 to 64 pixels, a width that is not positive, a rate outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        width: float = 1.0,
        stem_channels: int = 32,
        stages: tuple[tuple[int, ...], ...] = ((64, 96), (128, 160, 192)),
        norm: NormFactory = BatchNorm,
        activation: Callable[[], nn.Module] = ReLU,
        conv_dropout: float = 0.0,
        conv_dropout_type: DropoutFactory = nn.Dropout2d,
        fc_dropout: float = 0.0,
        weight_init: WeightInit = nn.init.kaiming_normal_,
    ) -> None:
        super().__init__()
        in_channels, height, image_width = image_shape
        if not 8 <= min(height, image_width) <= max(height, image_width) <= 64:
            raise ValueError(
                f"image_shape is {tuple(image_shape)}, but SmallInception takes sides of 8 to 64 pixels: "
                "resize the images (data.image_size) or choose project.models.GoogLeNet."
            )
        if width <= 0:
            raise ValueError(f"width is {width}, but it multiplies channel counts: choose a number above 0.")
        self.image_shape = tuple(image_shape)
        conv = conv_factory(norm, activation)
        channels = scale_channels(stem_channels, width)
        stem: list[nn.Module] = [conv(in_channels, channels, 3)]
        side = max(height, image_width)
        while side > 16:
            stem.append(nn.MaxPool2d(2, ceil_mode=True))
            side = (side + 1) // 2
        self.stem = nn.Sequential(*stem)
        layers: list[nn.Module] = []
        for index, stage in enumerate(stages):
            if index:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for out_channels in stage:
                block = _block(
                    channels,
                    scale_channels(out_channels, width),
                    conv=conv,
                    dropout=lambda: make_dropout(conv_dropout_type, conv_dropout, "conv_dropout"),
                )
                layers.append(block)
                channels = block.out_channels
        self.blocks = nn.Sequential(*layers)
        self.pool = GlobalAvgPool()
        self.dropout = make_dropout(nn.Dropout, fc_dropout, "fc_dropout")
        self.fc = nn.Linear(channels, num_classes)
        init_weights_(self, weight_init)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape, self)
        return self.fc(self.dropout(self.pool(self.blocks(self.stem(images)))))


def _block(in_channels: int, out_channels: int, **options: object) -> Inception:
    """An Inception block whose branches take 1/4, 1/2, 1/8 and the rest of ``out_channels``, bottlenecks half of that."""
    conv1x1 = out_channels // 4
    conv3x3 = out_channels // 2
    conv5x5 = out_channels // 8
    pool_proj = out_channels - conv1x1 - conv3x3 - conv5x5
    return Inception(
        in_channels,
        conv1x1,
        conv3x3 // 2,
        conv3x3,
        max(4, conv5x5),
        conv5x5,
        pool_proj,
        factorized=True,
        **options,  # type: ignore[arg-type]
    )
