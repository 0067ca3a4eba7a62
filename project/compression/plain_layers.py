"""The layers that compression cannot replace or compute in place of, with the reasons."""

from typing import TypeGuard

from torch import nn

from project.metrics.complexity import complexity_by_layer
from project.models.known import KINDS


def is_plain_layer(layer: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether a layer computes the convolution or the matrix product of ``nn.Conv2d`` or ``nn.Linear``.

    A subclass with a forward of its own that does so has an attribute ``computes_as``: ``nn.Conv2d`` or ``nn.Linear``.
    The subclasses of this class do not inherit it.

    Args:
        layer: any module; it is not changed.
    """
    kind = KINDS.get(type(layer), vars(type(layer)).get("computes_as"))  # type: ignore[arg-type]
    return kind in (nn.Conv2d, nn.Linear)


def other_layers(net: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, str]:
    """The convolutions and linear layers that another computation cannot stand in for, each with the reason, by name.

    These are subclasses with a forward of their own, and layers whose weight the net reads without calling them.

    Args:
        net: net that takes images ``[N, C, H, W]``; it is not changed.
        image_shape: shape (C, H, W) of an image.
    """
    called = {row.name for row in complexity_by_layer(net, image_shape) if row.output_shape}
    reasons = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if not is_plain_layer(layer):
                reasons[name] = f"its class {type(layer).__name__} may compute otherwise than torch's layers"
            elif name not in called:
                reasons[name] = "the net does not call it in evaluation"
    return reasons


def name_layers(reasons: dict[str, str]) -> str:
    """The first layers with their reasons, and the number of the others, for a message."""
    shown = [f"{name} ({reason})" for name, reason in list(reasons.items())[:2]]
    more = len(reasons) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
