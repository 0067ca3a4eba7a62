"""The one table of layers whose computation is known: code may read their attributes instead of calling them.

Kernels and compression read a layer's weight and settings and compute in its place. A subclass of a layer can compute
anything, such as a convolution that normalises its weight first. So a class is known only if it is itself in the table,
or says so in an attribute of its own.
"""

from typing import TypeGuard

from torch import nn

from project.models.layers import BatchNorm, MaxPool, ReLU

KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: nn.Conv2d,
    nn.Linear: nn.Linear,
    nn.BatchNorm2d: nn.BatchNorm2d,
    BatchNorm: nn.BatchNorm2d,
    nn.ReLU: nn.ReLU,
    ReLU: nn.ReLU,
    nn.MaxPool2d: nn.MaxPool2d,
    MaxPool: nn.MaxPool2d,
}
"""The known classes, each with the class of torch that computes the same from the same attributes."""


def is_plain_layer(layer: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether a layer computes the convolution or the matrix product of ``nn.Conv2d`` or ``nn.Linear``.

    A subclass with a forward of its own that does so has an attribute ``computes_as``: ``nn.Conv2d`` or ``nn.Linear``.
    The subclasses of this class do not inherit it.
    """
    kind = KINDS.get(type(layer), vars(type(layer)).get("computes_as"))  # type: ignore[arg-type]
    return kind in (nn.Conv2d, nn.Linear)
