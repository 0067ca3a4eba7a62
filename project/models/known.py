"""The one table of layers whose computation is known: code may read their attributes instead of calling them.

Kernels and compression read a layer's weight and settings and compute in its place. A subclass of a layer can compute
anything, such as a convolution that normalises its weight first. So a class is known only if it is itself in the table.
"""

from torch import nn

from project.models.layers import BatchNorm, MaxPool, ReLU

KINDS: dict[type[nn.Module], type[nn.Module]] = {
    **{kind: kind for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)},
    **{BatchNorm: nn.BatchNorm2d, ReLU: nn.ReLU, MaxPool: nn.MaxPool2d},
}
"""The known classes, each with the class of torch that computes the same from the same attributes."""
