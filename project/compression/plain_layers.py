"""The convolutions and linear layers that a technique understands, and why it does not understand another one.

A technique that reads a layer's weight, or computes in place of the layer, must know exactly what the layer does with
its weight. A subclass may do something else: it may standardise the weight first, or pad the images in its own way. A
parametrised layer, such as one with weight normalisation, computes its weight from other parameters. The classes are
those of :data:`project.models.known.KINDS`.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TypeGuard

from torch import nn
from torch.nn.utils import parametrize

from project.metrics.complexity import complexity_by_layer
from project.models.known import KINDS


def computes_as_plain(layer: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether a layer computes as ``nn.Conv2d`` or ``nn.Linear`` does, with a weight that may be computed.

    A subclass with a forward of its own that does so has an attribute ``computes_as``: ``nn.Conv2d`` or ``nn.Linear``.
    The subclasses of this class do not inherit it.

    Args:
        layer: any module; it is not changed.
    """
    kind = parametrize.type_before_parametrizations(layer)  # type: ignore[arg-type]
    return KINDS.get(kind, vars(kind).get("computes_as")) in (nn.Conv2d, nn.Linear)


def is_plain(layer: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether a layer computes as ``nn.Conv2d`` or ``nn.Linear`` does, and its parameters are its own.

    Args:
        layer: any module; it is not changed.
    """
    return computes_as_plain(layer) and "weight" in layer._parameters and not parametrize.is_parametrized(layer)


def other_layers(net: nn.Module, image_shape: tuple[int, int, int], *, computed: bool = False) -> dict[str, str]:
    """The convolutions and linear layers that another computation cannot stand in for, each with the reason, by name.

    These are subclasses with a forward of their own, layers whose weight is computed, and layers whose weight the net
    reads without calling them.

    Args:
        net: net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.
        computed: whether the other computation works with a weight that is computed, so that it is no reason.
    """
    called = {row.name for row in complexity_by_layer(net, image_shape) if row.output_shape}
    reasons = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if not computes_as_plain(layer):
                reasons[name] = f"its class {type(layer).__name__} may compute otherwise than torch's layers"
            elif not computed and not is_plain(layer):
                reasons[name] = "its weight is computed from other parameters"
            elif name not in called:
                reasons[name] = "the net does not call it in evaluation"
    return reasons


def read_by_torch(net: nn.Module) -> dict[str, str]:
    """The layers that a module of another class cannot replace, each with the reason, by name.

    These are the layers inside torch's ``TransformerEncoderLayer``.

    Args:
        net: any net; it is not changed.
    """
    reason = "torch's TransformerEncoderLayer reads its weight in evaluation"
    encoders = [name for name, module in net.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return {name: reason for name, _ in net.named_modules() if name.rpartition(".")[0] in encoders}


def check_plain(net: nn.Module, names: Iterable[str], technique: str) -> None:
    """Check that a technique can replace these layers.

    Args:
        net: net with the layers; it is not changed.
        names: names of the layers in the net.
        technique: subject of the error, such as ``"XNORNet"``.

    Raises:
        ValueError: if a layer is a subclass, if its weight is computed from other parameters, or if torch's
            ``TransformerEncoderLayer`` reads its weight.
    """
    names = list(names)
    check_weights(net, names, technique)
    odd = [name for name in names if not is_plain(net.get_submodule(name))]
    if odd:
        kind = type(net.get_submodule(odd[0])).__name__
        raise ValueError(
            f"{_some(odd)} is a {kind}, and {technique} knows only torch's own Conv2d and Linear: a subclass may use "
            "its weight in another way. Add such layers to exclude."
        )
    read = read_by_torch(net)
    if left := {name: read[name] for name in names if name in read}:
        raise ValueError(f"{technique} cannot replace {name_layers(left)}. Add such layers to exclude.")


def check_weights(net: nn.Module, names: Iterable[str], technique: str) -> None:
    """Check that a technique can change the weights of these layers.

    Args:
        net: net with the layers; it is not changed.
        names: names of the layers in the net.
        technique: subject of the error, such as ``"TernaryWeights"``.

    Raises:
        ValueError: if the weight of a layer is no parameter of its own.
    """
    computed = [name for name in names if "weight" not in net.get_submodule(name)._parameters]
    if computed:
        raise ValueError(
            f"the weight of {_some(computed)} is computed from other parameters (weight normalisation or another "
            f"parametrization), so that {technique} cannot change it: add such layers to exclude, or use plain layers."
        )


def name_layers(reasons: Mapping[str, str]) -> str:
    """The first layers with their reasons, and the number of the others, for a message.

    Args:
        reasons: the reason for each layer, by the layer's name.
    """
    shown = [f"{name} ({reason})" for name, reason in list(reasons.items())[:2]]
    more = len(reasons) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def copy_of(net: nn.Module) -> nn.Module:
    """A copy of a net.

    Args:
        net: any net; it is not changed.

    Raises:
        ValueError: if a weight is computed by a hook, as the old ``torch.nn.utils.weight_norm`` does.
    """
    try:
        return deepcopy(net)
    except RuntimeError as error:
        raise ValueError(
            f"{type(net).__name__} cannot be copied, because a layer's weight is computed by a hook, as in "
            "torch.nn.utils.weight_norm: use torch.nn.utils.parametrizations.weight_norm."
        ) from error


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
