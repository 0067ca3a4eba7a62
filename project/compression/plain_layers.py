"""The convolutions and linear layers that a technique understands, and why it does not understand another one.

A technique that reads a layer's weight, or computes in place of the layer, must know exactly what the layer does with
its weight. A subclass may do something else: it may standardise the weight first, or pad the images in its own way. A
parametrised layer, such as one with weight normalisation, computes its weight from other parameters.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

_PLAIN = (nn.Conv2d, nn.Linear)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is exactly a ``Conv2d`` or a ``Linear``, and its weight is its own parameter.

    Args:
        layer: any module; it is not changed.
    """
    return type(layer) in _PLAIN and "weight" in layer._parameters


def computes_as_plain(layer: nn.Module) -> bool:
    """Whether a layer computes as a ``Conv2d`` or a ``Linear`` does, with a weight that may be computed.

    Args:
        layer: any module; it is not changed.
    """
    return parametrize.type_before_parametrizations(layer) in _PLAIN


def check_plain(net: nn.Module, names: Iterable[str], technique: str) -> None:
    """Check that a technique can compute in place of these layers.

    Args:
        net: net with the layers; it is not changed.
        names: names of the layers in the net.
        technique: subject of the error, such as ``"TernaryWeights"``.

    Raises:
        ValueError: if a layer is a subclass, or if its weight is computed from other parameters.
    """
    check_weights(net, names, technique)
    odd = [name for name in names if not is_plain(net.get_submodule(name))]
    if odd:
        kind = type(net.get_submodule(odd[0])).__name__
        raise ValueError(
            f"{_some(odd)} is a {kind}, and {technique} knows only torch's own Conv2d and Linear: a subclass may use "
            "its weight in another way. Add such layers to exclude."
        )


def check_weights(net: nn.Module, names: Iterable[str], technique: str) -> None:
    """Check that a technique can change the weights of these layers.

    Args:
        net: net with the layers; it is not changed.
        names: names of the layers in the net.
        technique: subject of the error, such as ``"IterativeMagnitudePruning"``.

    Raises:
        ValueError: if the weight of a layer is no parameter of its own.
    """
    computed = [name for name in names if "weight" not in net.get_submodule(name)._parameters]
    if computed:
        raise ValueError(
            f"the weight of {_some(computed)} is computed from other parameters (weight normalisation or another "
            f"parametrization), so that {technique} cannot change it: add such layers to exclude, or use plain layers."
        )


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
