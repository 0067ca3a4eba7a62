"""A context in which a measurement may run the net in any way, and which leaves no trace of it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """Put a net back, to the bit, as it was when the context was entered; also if an error ends the context.

    That is: parameters, their gradients (also ``None``), buffers (such as running statistics of batch norm),
    ``requires_grad`` of each tensor, and the mode (training or evaluation) of each module. Also the random states of
    torch on the CPU and on the accelerators in use, of NumPy and of Python. Tensors stay the same objects at the same
    place in memory, so that an optimizer, which is not touched, continues with them.

    Not put back: plain attributes of modules, random generators of their own, and the structure of the net. It costs no
    pass, and memory for a copy of parameters, buffers and gradients.

    Args:
        net: module of any kind, which is measured inside the context.
    """
    tensors: list[tuple[dict[str, Any], str, Tensor | None, Tensor | None]] = [
        (table, name, tensor, tensor if tensor is None else tensor.detach().clone())
        for module in net.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
    ]
    parameters = list(net.parameters())
    gradients = [
        (parameter, parameter.grad, None if parameter.grad is None else parameter.grad.detach().clone())
        for parameter in parameters
    ]
    flags = [(tensor, tensor.requires_grad) for _, _, tensor, _ in tensors if tensor is not None]
    modes = [(module, module.training) for module in net.modules()]
    try:
        with _random_states():
            yield
    finally:
        for table, name, tensor, copy in tensors:
            table[name] = tensor
            _restore_(tensor, copy)
        for parameter, gradient, copy in gradients:
            parameter.grad = gradient
            _restore_(gradient, copy)
        for tensor, flag in flags:
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _restore_(tensor: Tensor | None, copy: Tensor | None) -> None:
    if tensor is not None and copy is not None:
        tensor.data.copy_(copy)  # .data: a graph that was recorded before the context can still be used


@contextmanager
def _random_states() -> Iterator[None]:
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    of_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_cuda is not None:
            torch.cuda.set_rng_state_all(of_cuda)
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)
