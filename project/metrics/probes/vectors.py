"""Parameters as one vector: what all probes share. Shapes: a vector is ``[n]``, with n values in all parameters."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Objective = Callable[[], Tensor]
"""Gives the scalar loss at the current parameters, with a graph for its gradient, and the same value in every call."""


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """The values of all tensors behind each other, as a new vector ``[n]``."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def set_(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Write a vector ``[n]`` into the parameters, whose place and layout in memory stay.

    Autograd does not see it, so that a graph from before can still be used once the values are back.
    """
    parts = vector.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data.copy_(part.view(parameter.shape))


@contextmanager
def moved(parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """A context that gives the parameters as a vector ``[n]`` and puts the same bits back when it ends."""
    start = flat([parameter.detach() for parameter in parameters])
    try:
        yield start
    finally:
        set_(parameters, start)


def loss_and_gradient(objective: Objective, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """The loss ``[]`` and its gradient ``[n]``: one forward and one backward pass. ``.grad`` stays as it is.

    A parameter that the loss does not depend on has the gradient 0.
    """
    with torch.inference_mode(False), torch.enable_grad():
        loss = check_scalar(objective())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach(), flat(gradients)


def check_scalar(loss: Tensor) -> Tensor:
    """The loss as a tensor of one value.

    Raises:
        ValueError: if it has several values, or no graph for a gradient.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"objective gives {given}: let it return the loss as a tensor of one value.")
    if not loss.requires_grad:
        raise ValueError(
            "objective gives a loss without a graph: compute it without torch.no_grad, from parameters with "
            "requires_grad."
        )
    return loss.reshape(())


def check_parameters(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters as a list.

    Raises:
        ValueError: if there is none, if one has no gradient, or if they differ in type or device.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("parameters is empty: give those of the net that have requires_grad.")
    frozen = sum(not parameter.requires_grad for parameter in parameters)
    if frozen:
        raise ValueError(f"parameters has {frozen} without requires_grad: leave them out.")
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) > 1:
        raise ValueError("parameters differ in type or device: convert the net with net.to(device, dtype) first.")
    return parameters
