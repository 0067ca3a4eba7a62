"""Thin a net in the middle of a run: the optimizer's state and other copies of the weights lose the same indices."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from project.compression.thinning.thin import Kept, Thin, sliced


def thin_state(state: Mapping[str, Tensor], plan: Thin, prefix: str = "") -> dict[str, Tensor]:
    """A state dict, or averages of it, without the indices that a plan removes.

    Args:
        state: tensors by the names of the net's parameters and buffers; they are not changed.
        plan: plan by which the net is thinned, of :func:`project.compression.thinning.units.plan_thinning`.
        prefix: text before the net's names in ``state``, such as ``"net."``.
    """
    slices = {f"{prefix}{name}": kept for name, kept in plan.slices.items()}
    return {name: sliced(tensor, slices[name]) if name in slices else tensor for name, tensor in state.items()}


def thin_optimizers_(optimizers: Iterable[torch.optim.Optimizer], before: Mapping[str, nn.Parameter], net: nn.Module,
                     plan: Thin) -> None:  # fmt: skip
    """Let optimizers train the parameters of a thinned net, with the state that they had for the indices that stay.

    A tensor of the state that has the shape of its parameter loses the same indices. If the state of a parameter has
    tensors of another shape, such as sums over rows, this state begins anew.

    Args:
        optimizers: optimizers of the net; they are changed in place.
        before: the net's parameters by their names, before it was thinned.
        net: the net after it was thinned.
        plan: plan by which it was thinned.
    """
    after = dict(net.named_parameters(remove_duplicate=False))
    changed = {id(old): (after[name], plan.slices[name]) for name, old in before.items() if name in plan.slices}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for number, old in enumerate(group["params"]):
                if id(old) not in changed:
                    continue
                new, kept = changed[id(old)]
                group["params"][number] = new
                if old in optimizer.state:
                    state = _thin_parameter_state(optimizer.state.pop(old), old, kept)
                    if state:
                        optimizer.state[new] = state


def _thin_parameter_state(state: Mapping[str, Any], old: Tensor, kept: list[Kept]) -> dict[str, Any]:
    """The optimizer's state of one parameter without the indices that are gone; empty if it has other shapes."""
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    if any(value.shape != old.shape for value in tensors):
        return {}
    return {
        key: sliced(value, kept) if isinstance(value, Tensor) and value.dim() else value for key, value in state.items()
    }
