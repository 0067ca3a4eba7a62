"""Limits for the net of a file from a stranger, while it is built and tried, on the meta device or with real values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

_MAX_OPERATIONS = 200_000
_MAX_FLOPS = 1 << 41
"""Largest number of floating point operations for two images, in matrix products and convolutions."""


class Bounds(TorchDispatchMode):
    """A context in which torch refuses a net that would take much memory or much time.

    With ``max_total``, an operation is first run on the meta device, where it takes no memory, and only an operation
    within the limits is run for real.

    Args:
        max_values: largest number of values of a tensor.
        max_total: largest number of values of all new tensors together, for a net that is built with real values;
            ``None`` for a net on the meta device.

    Raises:
        ValueError: by the operation that goes beyond a limit.
    """

    def __init__(self, max_values: int, max_total: int | None = None) -> None:
        super().__init__()
        self.max_values, self.max_total = max_values, max_total
        self.operations, self.flops, self.total = 0, 0, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.max_total is None:
            result = func(*args, **kwargs)
            self._check(func, args, kwargs, result)
            return result
        try:
            on_meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            rough = func(*on_meta[0], **(on_meta[1] | ({"device": "meta"} if kwargs.get("device") else {})))
        except (
            NotImplementedError,
            RuntimeError,
        ):  # it reads values: its result is no larger than its inputs, or small
            rough = None
        self._check(func, args, kwargs, rough)
        result = func(*args, **kwargs)
        if rough is None:
            self._check(func, args, kwargs, result)
        return result

    def _check(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Count an operation and its result."""
        self.operations += 1
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None and result is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(tensor.numel() > self.max_values for tensor in tensors):
            raise ValueError(f"its net has a tensor of more than {self.max_values} values")
        if not any(returned.alias_info for returned in func._schema.returns):  # type: ignore[attr-defined]
            self.total += sum(tensor.numel() for tensor in tensors)
        if self.max_total is not None and self.total > self.max_total:
            raise ValueError("its net computes more values while it is built than a file may ask for")
        if self.operations > _MAX_OPERATIONS or self.flops > _MAX_FLOPS:
            raise ValueError("its net takes more operations than a file may ask for")
