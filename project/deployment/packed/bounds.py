"""Limits for the net of a file from a stranger, while it is built and tried on the meta device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_MAX_OPERATIONS = 200_000
_MAX_FLOPS = 1 << 41
"""Largest number of floating point operations for two images, in matrix products and convolutions."""


class Bounds(TorchDispatchMode):
    """A context in which torch refuses a net that would take much memory or much time.

    Args:
        max_values: largest number of values of a tensor.

    Raises:
        ValueError: by the operation that goes beyond a limit.
    """

    def __init__(self, max_values: int) -> None:
        super().__init__()
        self.max_values = max_values
        self.operations, self.flops = 0, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        if any(isinstance(leaf, Tensor) and leaf.numel() > self.max_values for leaf in tree_leaves(result)):
            raise ValueError(f"its net has a tensor of more than {self.max_values} values")
        if self.operations > _MAX_OPERATIONS or self.flops > _MAX_FLOPS:
            raise ValueError("its net takes more operations than a file may ask for")
        return result
