"""The cost of a net in parameters, multiply-accumulates and bytes, in total and layer by layer.

A multiply-accumulate (MAC; the Inception papers call it "multiply-add" and "ops") is one multiplication and one
addition. ``torch.utils.flop_counter`` counts two FLOPs for it. Convolutions and matrix products are counted as they
run, so a factorised or thinned layer counts with its new structure. Biases, norms, activations and poolings are not
counted. Weights that are zero are counted, because a dense kernel multiplies by them too.

Torch has fused kernels for attention and recurrent layers that its counter does not know. They are switched off during
the count, so that the matrix products they consist of run and are counted. Attention with a mask counts as without.

The counters run the net once on zeros, in eval mode and without gradients. They change nothing in the net: not the mode
of a module, not the running statistics of batch norm, not the random state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class LayerComplexity:
    """One row of :func:`complexity_by_layer`.

    Example::

        >>> from torch import nn
        >>> from project.metrics import complexity_by_layer
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 10))
        >>> for layer in complexity_by_layer(net, image_shape=(1, 8, 8)):
        ...     print(layer.name, layer.type, layer.num_params, layer.macs, layer.output_shape)
        0 Conv2d 80 4608 (8, 8, 8)
        2 Linear 5130 5120 (10,)

    Args:
        name: name of the layer in ``net.named_modules()``.
        type: name of the layer's class.
        num_params: number of the layer's own parameters, without those of its children and those that an earlier row
            counts, 0 or more.
        macs: number of the layer's own multiply-accumulates for one image, 0 or more.
        output_shape: shape of the layer's last output, without the batch; of several tensors, the first one's. ``()``
            if there is none.
    """

    name: str
    type: str
    num_params: int
    macs: int
    output_shape: tuple[int, ...]


def count_parameters(net: nn.Module) -> int:
    """Number of parameters. A shared parameter counts once; buffers such as running statistics do not count.

    Args:
        net: network whose parameters are counted.
    """
    return sum(parameter.numel() for parameter in net.parameters())


def count_nonzero(net: nn.Module) -> int:
    """Number of parameters that are not exactly zero. A shared parameter counts once.

    Args:
        net: network whose parameters are counted.
    """
    return sum(int(torch.count_nonzero(parameter)) for parameter in net.parameters())


def parameter_bytes(net: nn.Module) -> int:
    """Bytes of the parameters in memory, in their own types. A file on disk also holds a header and the buffers.

    Args:
        net: network whose parameters are counted.
    """
    return sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())


def count_macs(net: nn.Module, image_shape: tuple[int, int, int], batch: int = 1) -> int:
    """Multiply-accumulates of one forward pass.

    Args:
        net: network that takes images ``[N, C, H, W]``.
        image_shape: shape (C, H, W) of an image.
        batch: number of images, at least 1. The count is proportional to it.
    """
    with _evaluating(net), FlopCounterMode(display=False) as counter:
        net(_zeros(net, (batch, *image_shape)))
    return counter.get_total_flops() // 2


def complexity_by_layer(net: nn.Module, image_shape: tuple[int, int, int]) -> list[LayerComplexity]:
    """One row for every module that has parameters or MACs of its own, in the order of ``net.named_modules()``.

    The sum of ``macs`` is :func:`count_macs`, and the sum of ``num_params`` is :func:`count_parameters`. The first
    module that has a shared parameter counts it. A module that is never called has no MACs and the output shape ``()``;
    the one that computes with its weight has the MACs, as attention does for its output projection.

    Args:
        net: network that takes images ``[N, C, H, W]``.
        image_shape: shape (C, H, W) of an image.
    """
    with _evaluating(net), FlopCounterMode(display=False) as counter:
        trace = _Trace(net, counter)
        try:
            net(_zeros(net, (1, *image_shape)))
        finally:
            trace.remove()
    rows, counted = [], set[nn.Parameter]()
    for name, module in net.named_modules():
        own = {*module.parameters(recurse=False)}
        num_params = sum(parameter.numel() for parameter in own - counted)
        counted |= own
        macs = trace.flops.get(module, 0) // 2
        if own or macs:
            rows.append(LayerComplexity(name, type(module).__name__, num_params, macs, trace.shapes.get(module, ())))
    return rows


class _Trace:
    """Forward hooks that record each module's FLOPs without those of its children, and the shape of its output."""

    def __init__(self, net: nn.Module, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.flops: dict[nn.Module, int] = {}
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        # For each running module: the count at its start, and the FLOPs of its children until now.
        self.open: list[tuple[int, int]] = []
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
        if (first := next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)) is not None:
            self.shapes[module] = tuple(first.shape[1:])
        if self.open:
            parent_start, siblings = self.open[-1]
            self.open[-1] = (parent_start, siblings + spent)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Put the net into eval mode, without gradients and fused kernels. Afterwards all is as before."""
    modes = {module: module.training for module in net.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
    # Without recurrent layers they stay: convolutions need them to be fast.
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn] if recurrent else []
    enabled = [library.enabled for library in libraries]
    net.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    for library in libraries:
        library.enabled = False
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training


def _zeros(net: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Black images on the net's device and in its type."""
    parameter = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
