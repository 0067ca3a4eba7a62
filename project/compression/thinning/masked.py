"""The masked net: all sizes stay, and everything that belongs to removed units is zero.

It is the reference for thinning, because it computes what the thinned net computes, in evaluation and in training.
Zeros alone do that wherever each channel is treated on its own: the layers that read a removed channel multiply it by
zero. A norm that takes statistics over channels must leave the removed channels out of them. So these functions are
replaced while the masked net runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from project.compression.thinning.calls import REDUCTIONS, MixingCalls, ModuleStack

Calls = Mapping[tuple[str, int], tuple[dict[int, list[int]], int]]
"""For each call of a norm (module, and number of the call in the module): by dimension of its input the channels that
stay, and the number of groups that stay (0 if the function has none)."""


class MaskedNet(nn.Module):
    """Runs a net in which everything that belongs to removed units is zero.

    Args:
        net: net whose parameters and buffers are set to zero in these places.
        zeros: indices to set to zero, by the name of the parameter or buffer and by dimension.
        calls: the norms whose statistics leave channels out.
    """

    def __init__(self, net: nn.Module, zeros: Mapping[str, Mapping[int, list[int]]], calls: Calls) -> None:
        super().__init__()
        self.net = net
        self._calls = calls
        with torch.no_grad():
            tensors: dict[str, Tensor] = {**dict(self.net.named_parameters(remove_duplicate=False))}
            tensors |= dict(self.net.named_buffers(remove_duplicate=False))
            for name, dims in zeros.items():
                for dim, indices in dims.items():
                    tensors[name].index_fill_(dim, torch.tensor(indices), 0)

    def forward(self, images: Tensor) -> Any:
        """The net's output for images ``[N, C, H, W]``."""
        stack = ModuleStack(self.net)
        try:
            with _WithoutChannels(stack, self._calls):
                return self.net(images)
        finally:
            stack.close()


class _WithoutChannels(MixingCalls):
    """Computes norms from the channels that stay; the others become zero."""

    def __init__(self, stack: ModuleStack, calls: Calls) -> None:
        super().__init__(stack)
        self._calls = calls

    def call(self, key: tuple[str, int], name: str, function: Any, args: Any, kwargs: Any) -> Any:
        if key not in self._calls:
            return function(*args, **kwargs)
        kept, num_groups = self._calls[key]
        x, *rest = args
        part = x
        for dim, channels in kept.items():
            part = part.index_select(dim, torch.tensor(channels))
        if name in REDUCTIONS:
            return function(part, *rest, **kwargs)
        if name in ("layer_norm", "rms_norm"):
            shape = rest[0]
            first = x.dim() - len(shape)
            rest[0] = list(part.shape[first:])
            over = {dim - first: channels for dim, channels in kept.items()}
            rest[1:], kwargs = _cut(rest[1:], kwargs, over, x.shape[first:])
        else:
            if name == "group_norm":
                rest[0] = num_groups
            own = rest[1:] if name == "group_norm" else rest
            over = {0: kept[1]} if 1 in kept else {}
            own, kwargs = _cut(own, kwargs, over, x.shape[1:2])
            rest = [*rest[:1], *own] if name == "group_norm" else own
        result = function(part, *rest, **kwargs)
        for dim, channels in kept.items():
            wide = [*result.shape]
            wide[dim] = x.shape[dim]
            result = result.new_zeros(wide).index_copy(dim, torch.tensor(channels), result)
        return result


def _cut(args: Any, kwargs: Any, over: dict[int, list[int]], shape: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with those tensors cut that have the shape of the norm's weight."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == shape:
            for dim, channels in over.items():
                value = value.index_select(dim, torch.tensor(channels))
        return value

    return [cut(value) for value in args], {key: cut(value) for key, value in kwargs.items()}
