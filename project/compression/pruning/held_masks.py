"""Masks held to an optimizer: what is pruned stays zero whatever momentum, decay or averages do to it."""

from typing import Any

import torch
from torch import Tensor, nn

from project.compression.pruning.masks import Masks


class HeldMasks:
    """Multiplies a net's parameters by their masks after each step of its optimizer."""

    def __init__(self) -> None:
        self._hook: Any = None

    def hold(self, net: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> Masks:
        """From now on; what was held before is let go.

        Returns:
            the masks, on the parameters' device and of their type.
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
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def mask_gradients_(net: nn.Module, masks: Masks) -> None:
    """What is pruned has no gradient. Optimizers that go weight by weight do not care; Muon makes a layer's whole step
    orthogonal, and without the dead weights' part the others learn better (93.3 against 92.9 %, one seed).
    """
    for name, mask in masks.items():
        if (gradient := net.get_parameter(name).grad) is not None:
            gradient.mul_(mask)


def _like(mask: Tensor, parameter: nn.Parameter) -> Tensor:
    mask = mask.to(parameter.device)
    if mask.dtype == parameter.dtype:
        return mask
    return torch.empty_like(parameter).copy_(mask) if mask.shape == parameter.shape else mask.to(parameter.dtype)
