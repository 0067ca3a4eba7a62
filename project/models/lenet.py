"""LeNet-300-100 and LeNet-5, the two nets on which pruning papers report.

Gradient-based learning applied to document recognition, LeCun et al. 1998 (Proc. IEEE 86(11)), sections II.B and
III.C.2; here in the versions of the pruning papers (Han et al. 2015, arXiv:1506.02626, tables 3 and 4; Frankle &
Carbin 2019, arXiv:1803.03635, figure 2): ReLU instead of scaled tanh, and for LeNet-5 the widths of Caffe's example
(``examples/mnist/lenet_train_test.prototxt``).

Layers are named as in Han et al., ``fc1 fc2 fc3`` and ``conv1 conv2 fc1 fc2``. Norms, of which neither paper has any,
sit before the activation; on vectors they see 1x1 maps.
"""

from collections.abc import Callable
from math import prod

from torch import Tensor, nn

from project.models.layers import (
    ConvNormAct,
    DropoutFactory,
    MaxPool,
    NoNorm,
    NormFactory,
    ReLU,
    WeightInit,
    check_images,
    check_sides,
    init_weights_,
    make_dropout,
    spatial_size,
)


class LeNet300100(nn.Module):
    """An MLP with hidden layers of 300 and 100: ``[N, C, H, W] -> [N, num_classes]``; 266,610 parameters on MNIST.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of the images, any size.
        norm: factory of the norm after each hidden layer, number of features first.
        activation: factory of the activation.
        fc_dropout: rate after each hidden layer, in [0, 1).
        weight_init: fills the weights in place; Glorot normal as in Frankle & Carbin, figure 2.

    Raises:
        ValueError: for a rate outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        norm: NormFactory = NoNorm,
        activation: Callable[[], nn.Module] = ReLU,
        fc_dropout: float = 0.0,
        weight_init: WeightInit = nn.init.xavier_normal_,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.norm1, self.norm2 = norm(300), norm(100)
        self.fc1 = nn.Linear(prod(image_shape), 300, bias=_needs_bias(self.norm1))
        self.fc2 = nn.Linear(300, 100, bias=_needs_bias(self.norm2))
        self.fc3 = nn.Linear(100, num_classes)
        self.act1, self.act2 = activation(), activation()
        self.dropout1 = make_dropout(nn.Dropout, fc_dropout, "fc_dropout")
        self.dropout2 = make_dropout(nn.Dropout, fc_dropout, "fc_dropout")
        init_weights_(self, weight_init)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape, self)
        x = images.flatten(1)
        x = self.dropout1(self.act1(_norm_vectors(self.norm1, self.fc1(x))))
        x = self.dropout2(self.act2(_norm_vectors(self.norm2, self.fc2(x))))
        return self.fc3(x)


class LeNet5(nn.Module):
    """Caffe's LeNet-5: ``[N, C, H, W] -> [N, num_classes]``; 431,080 parameters on MNIST.

    Two unpadded 5x5 convolutions (20 and 50 channels), each followed by 2x2 max pooling, then 500 hidden units.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of the images; sides of at least 16 pixels.
        norm: factory of the norm after each convolution and the hidden layer, number of channels first.
        activation: factory of the activation after the hidden layer.
        conv_activation: factory of the activation after the convolutions; Caffe has none there, only the max pooling.
        conv_dropout: rate after each pooling, in [0, 1).
        conv_dropout_type: element (``nn.Dropout``), channel (``nn.Dropout2d``) or ``DropPath``.
        fc_dropout: rate after the hidden layer, in [0, 1).
        weight_init: fills the weights in place; Glorot uniform as in Caffe ("xavier", which divides by the fan-in
            alone).

    Raises:
        ValueError: for a side under 16 pixels, a rate outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        norm: NormFactory = NoNorm,
        activation: Callable[[], nn.Module] = ReLU,
        conv_activation: Callable[[], nn.Module] = nn.Identity,
        conv_dropout: float = 0.0,
        conv_dropout_type: DropoutFactory = nn.Dropout2d,
        fc_dropout: float = 0.0,
        weight_init: WeightInit = nn.init.xavier_uniform_,
    ) -> None:
        super().__init__()
        check_sides(image_shape, 16, self)
        in_channels, *sides = image_shape
        self.image_shape = tuple(image_shape)
        self.conv1 = ConvNormAct(in_channels, 20, 5, padding=0, norm=norm, activation=conv_activation)
        self.conv2 = ConvNormAct(20, 50, 5, padding=0, norm=norm, activation=conv_activation)
        self.pool = MaxPool(2)
        self.conv_dropout1 = make_dropout(conv_dropout_type, conv_dropout, "conv_dropout")
        self.conv_dropout2 = make_dropout(conv_dropout_type, conv_dropout, "conv_dropout")
        self.norm1 = norm(500)
        self.fc1 = nn.Linear(50 * prod(_final_side(side) for side in sides), 500, bias=_needs_bias(self.norm1))
        self.act1 = activation()
        self.dropout1 = make_dropout(nn.Dropout, fc_dropout, "fc_dropout")
        self.fc2 = nn.Linear(500, num_classes)
        init_weights_(self, weight_init)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.image_shape, self)
        x = self.conv_dropout1(self.pool(self.conv1(images)))
        x = self.conv_dropout2(self.pool(self.conv2(x))).flatten(1)
        x = self.dropout1(self.act1(_norm_vectors(self.norm1, self.fc1(x))))
        return self.fc2(x)


def _final_side(side: int) -> int:
    """Side after both convolutions and poolings: 28 -> 4."""
    for _ in range(2):
        side = spatial_size(spatial_size(side, 5, 1, 0), 2, 2, 0)
    return side


def _needs_bias(norm: nn.Module) -> bool:
    return isinstance(norm, nn.Identity)


def _norm_vectors(norm: nn.Module, x: Tensor) -> Tensor:
    """Norms take maps: ``[N, C] -> [N, C, 1, 1] -> [N, C]``."""
    return norm(x[:, :, None, None]).flatten(1)
