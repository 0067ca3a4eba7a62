"""What a net costs: parameters, multiply-accumulates, bytes; in all and layer by layer.

A multiply-accumulate (MAC, "multiply-add" in the Inception papers, their "ops") is one multiplication and one
addition: half of the FLOPs that ``torch.utils.flop_counter`` counts. Counted are convolutions and matrix products as
they run, so factorised or thinned layers count as what they have become. Not counted: biases, norms, activations,
poolings. Zeros are not skipped: a dense kernel multiplies by them all the same.

The counters run the net once on zeros, in eval mode and without gradients, and leave it as it was: the mode of every
module, the running statistics of batch norm, and the random state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerComplexity:
    """One row of :func:`complexity_by_layer`.

    Args:
        name: name in ``net.named_modules()``.
        type: class name.
        num_params: the layer's own parameters, without its children's.
        macs: multiply-accumulates of its own for one image.
        output_shape: shape of the last output, without the batch.
    """

    name: str
    type: str
    num_params: int
    macs: int
    output_shape: tuple[int, ...]


def count_parameters(net: nn.Module) -> int:
    """Number of parameters, shared ones once; buffers such as running statistics are none."""
    return sum(parameter.numel() for parameter in net.parameters())


def count_nonzero(net: nn.Module) -> int:
    """Number of parameters that are not exactly zero, shared ones once."""
    return sum(int(torch.count_nonzero(parameter)) for parameter in net.parameters())


def parameter_bytes(net: nn.Module) -> int:
    """Bytes of the parameters in memory, in the types they have; a file on disk has a header and buffers besides."""
    return sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())


def count_macs(net: nn.Module, image_shape: tuple[int, int, int], batch: int = 1) -> int:
    """Multiply-accumulates of one forward pass.

    Args:
        net: takes images ``[N, C, H, W]``.
        image_shape: (C, H, W).
        batch: number of images; the count grows in proportion.
    """
    with _evaluating(net), FlopCounterMode(display=False) as counter:
        net(_zeros(net, (batch, *image_shape)))
    return counter.get_total_flops() // 2


def complexity_by_layer(net: nn.Module, image_shape: tuple[int, int, int]) -> list[LayerComplexity]:
    """One row for every module that has parameters or MACs of its own, in the order of ``net.named_modules()``.

    The columns add up: ``num_params`` to :func:`count_parameters` (unless layers share parameters or are never called)
    and ``macs`` to :func:`count_macs`.

    Args:
        net: takes images ``[N, C, H, W]``.
        image_shape: (C, H, W).
    """
    with _evaluating(net), FlopCounterMode(display=False) as counter:
        trace = _Trace(net, counter)
        try:
            net(_zeros(net, (1, *image_shape)))
        finally:
            trace.remove()
    rows = []
    for name, module in net.named_modules():
        num_params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        macs = trace.flops.get(module, 0) // 2
        if module in trace.shapes and (num_params or macs):
            rows.append(LayerComplexity(name, type(module).__name__, num_params, macs, trace.shapes[module]))
    return rows


class _Trace:
    """Forward hooks that note each module's FLOPs, less those of its children, and its output's shape."""

    def __init__(self, net: nn.Module, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.flops: dict[nn.Module, int] = {}
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self.open: list[
            tuple[int, int]
        ] = []  # of each running module: count at its start, FLOPs of its children so far
        self.handles = [
            handle
            for module in net.modules()
            for handle in (module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave))
        ]

    def _enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        self.open.append((self.counter.get_total_flops(), 0))

    def _leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        start, of_children = self.open.pop()
        spent = self.counter.get_total_flops() - start
        self.flops[module] = self.flops.get(module, 0) + spent - of_children
        if isinstance(output, Tensor):
            self.shapes[module] = tuple(output.shape[1:])
        if self.open:
            parent_start, siblings = self.open[-1]
            self.open[-1] = (parent_start, siblings + spent)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in, also where they differ."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _zeros(net: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Black images of the net's device and type."""
    parameter = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
