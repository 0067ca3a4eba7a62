"""Masks that an optimizer step cannot undo: pruned weights stay zero despite momentum and weight decay."""

from typing import Any

import torch
from torch import Tensor, nn

from project.compression.pruning.masks import Masks


class HeldMasks:
    """Multiplies a net's parameters by their masks after each step of its optimizer."""

    def __init__(self) -> None:
        self._hook: Any = None

    def hold(self, net: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> Masks:
        """Multiply the parameters by these masks after each step from now on, and drop the masks held before.

        Args:
            net: the net whose parameters are masked.
            masks: the mask of each pruned parameter, by the parameter's name.
            optimizer: the optimizer after whose steps the masks act.

        Returns:
            The masks, with the device and the type of their parameters.
        """
        self.release()
        parameters = {name: net.get_parameter(name) for name in masks}
        masks = {name: _like(mask, parameters[name]) for name, mask in masks.items()}
        live = [parameter.detach() for parameter in parameters.values()]
        factors = list(masks.values())

        def multiply(*_: object) -> None:
            torch._foreach_mul_(live, factors)

        if live:
            self._hook = optimizer.register_step_post_hook(multiply)
        return masks

    def release(self) -> None:
        """Stop masking; do nothing if no masks are held."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def mask_gradients_(net: nn.Module, masks: Masks) -> None:
    """Set the gradients of the pruned weights to zero, in place.

    For optimizers that update each weight on its own this changes nothing that lasts. Muon makes the step of a whole
    layer orthogonal, and the remaining weights learn better if pruned weights have no part in it (93.3 instead of
    92.9 %, one seed).

    Args:
        net: the net, after the backward pass.
        masks: the mask of each pruned parameter, by the parameter's name.
    """
    for name, mask in masks.items():
        if (gradient := net.get_parameter(name).grad) is not None:
            gradient.mul_(mask)


def _like(mask: Tensor, parameter: nn.Parameter) -> Tensor:
    """The mask with the parameter's device and type, and with its memory format if both have the same shape."""
    mask = mask.to(parameter.device)
    if mask.dtype == parameter.dtype:
        return mask
    return torch.empty_like(parameter).copy_(mask) if mask.shape == parameter.shape else mask.to(parameter.dtype)
