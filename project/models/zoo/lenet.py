"""LeNet-300-100 and LeNet-5, the two nets of which the pruning papers report results.

Gradient-based learning applied to document recognition, LeCun et al. 1998 (Proc. IEEE 86(11)), sections II.B and
III.C.2. The nets here are the versions of the pruning papers (Han et al. 2015, arXiv:1506.02626, tables 3 and 4;
Frankle & Carbin 2019, arXiv:1803.03635, figure 2): ReLU instead of scaled tanh, and for LeNet-5 the widths of Caffe's
example (``examples/mnist/lenet_train_test.prototxt``).

Layers have the names of Han et al., ``fc1 fc2 fc3`` and ``conv1 conv2 fc1 fc2``. Neither paper has norms. A chosen norm
stands before the activation; a vector goes through it as a 1x1 map.
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
    """An MLP with hidden layers of 300 and 100 units: ``[N, C, H, W] -> [N, num_classes]``.

    It has 266,610 parameters on MNIST.

    Example::

        model:
          net:
            class_path: project.models.LeNet300100
            init_args: {fc_dropout: 0.2}

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images, which may have any size.
        norm: factory of the norm after each hidden layer, which takes the number of features first.
        activation: factory of the activation, called without arguments.
        fc_dropout: dropout rate after each hidden layer, in [0, 1).
        weight_init: function that fills the weight of a layer in place; Glorot normal as in Frankle & Carbin, figure 2.

    Raises:
        ValueError: if a rate is outside [0, 1).
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

    The net has two unpadded 5x5 convolutions (20 and 50 channels), each followed by 2x2 max pooling, then 500 hidden
    units.

    Example::

        data:
          class_path: project.data.MNIST
        model:
          net:
            class_path: project.models.LeNet5
            init_args: {conv_activation: project.models.ReLU}

    Args:
        num_classes: number of classes and of logits, at least 1.
        image_shape: shape (C, H, W) of the images, with sides of at least 16 pixels.
        norm: factory of the norm after each convolution and after the hidden layer, which takes the number of channels
            first.
        activation: factory of the activation after the hidden layer, called without arguments.
        conv_activation: factory of the activation after each convolution, called without arguments. Caffe has none
            there, only the max pooling.
        conv_dropout: dropout rate after each pooling, in [0, 1).
        conv_dropout_type: class of this dropout: ``nn.Dropout`` drops elements, ``nn.Dropout2d`` channels, ``DropPath``
            all channels of an image.
        fc_dropout: dropout rate after the hidden layer, in [0, 1).
        weight_init: function that fills the weight of a layer in place; Glorot uniform as in Caffe (whose "xavier"
            divides by the fan-in alone).

    Raises:
        ValueError: if a side is under 16 pixels, or if a rate is outside [0, 1).
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
    """Apply a norm of maps to vectors: ``[N, C] -> [N, C, 1, 1] -> [N, C]``."""
    return norm(x[:, :, None, None]).flatten(1)
