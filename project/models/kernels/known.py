"""The layers that kernels can replace. For any other layer torch's own operators run.

A kernel reads a layer's attributes and does not call the layer. A subclass can compute anything. So a class is known
only if it is itself in the table :data:`project.models.known.KINDS`; a subclass of a known class is not known.
"""

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

from project.models.known import KINDS

Layer = TypeVar("Layer", bound=nn.Module)

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {kind: kind.forward for kind in KINDS}
"""The original ``forward`` of each class, to detect that other code has replaced it."""

_METHODS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl")
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_HIDDEN = (*_METHODS, *_TENSORS)
"""The methods that a call of a known layer runs, and the tensors that it reads. None of these names is in the
instance's own dictionary. If other code puts an object there under such a name, the object hides the original.
"""


def has_known_class(layer: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether the class of ``layer`` is known to compute the same as torch's class ``kind``, by its own ``forward``.

    Only a layer's ``forward`` should use this function. Code that does not call the layer uses :func:`is_known`.
    """
    cls = type(layer)
    return KINDS.get(cls) is kind and cls.forward is _FORWARDS[cls] and kind.forward is _FORWARDS[kind]


def is_known(layer: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether a call of ``layer`` does exactly the same as torch's class ``kind``, and no hook sees the call.

    False if the class is not known, if a method or a tensor was replaced on the class or on the instance, or if the
    layer has a hook, or if there is a global hook.
    """
    return has_known_class(layer, kind) and not has_hooks(layer) and vars(layer).keys().isdisjoint(_HIDDEN)


def has_hooks(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` runs hooks: hooks of the layer or global hooks of all modules."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch_module._has_any_global_hook()
    )
