"""Other sizes for splits whose sizes are numbers in the source code of a module.

``torch.split(x, [8, 16], 1)`` in a forward pass states the widths of two groups of channels, and no attribute does.
When some of these channels are removed, the source code stays. So the class of the module becomes a subclass. It runs
the module's own forward pass in a mode that gives such a call the sizes that are left (:func:`cut_`). A call is known
by its numbers, its dimension, and the size of this dimension after thinning. A list of sizes that does not add up to
the size of the dimension is an error in torch, so that no valid call with a list ever changes.

The limit: the mode also sees the calls of the modules inside. Where a call with one number, such as ``x.split(8, 1)``,
could be mistaken for that of another module, the trace keeps the channels
(:meth:`project.compression.thinning.couplings.Couplings.cut`).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Cut(NamedTuple):
    """A call that cuts a dimension into parts, as the source code states it.

    Args:
        kind: ``"split"`` or ``"chunk"``.
        dim: the dimension, 0 or more.
        stated: the sizes of all parts, the size of each part (split), or the number of parts (chunk).
    """

    kind: str
    dim: int
    stated: tuple[int, ...] | int

    def parts_of(self, size: int) -> list[int]:
        """The sizes of the parts of a dimension of this size, 0 or more, as the call stands."""
        if isinstance(self.stated, tuple):
            return [*self.stated]
        parts = torch.empty(size, device="meta")
        cut = parts.split if self.kind == "split" else parts.chunk
        return [len(part) for part in cut(self.stated)]


Plain = list[Any]
"""A cut and the sizes of its parts after thinning, as plain values: ``[kind, dim, stated, sizes]``."""

_KINDS: dict[Callable[..., Any], str] = {
    torch.split: "split",
    torch.split_with_sizes: "split",
    torch.chunk: "chunk",
    Tensor.split: "split",
    Tensor.split_with_sizes: "split",
    Tensor.chunk: "chunk",
}


def cut_of(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Cut] | None:
    """The tensor that a call cuts, and the cut; ``None`` for a call of another function.

    Args:
        function: function of torch, or method of a tensor.
        args: its positional arguments.
        kwargs: its named arguments.
    """
    kind = _KINDS.get(function)
    if kind is None:
        return None
    named = {**dict(zip(("x", "stated", "dim"), args, strict=False)), **kwargs}
    dim = named.pop("dim", 0)
    (x,) = (each for each in named.values() if isinstance(each, Tensor))
    (stated,) = (each for each in named.values() if not isinstance(each, Tensor))
    return x, Cut(kind, dim % x.dim(), tuple(stated) if isinstance(stated, list | tuple) else stated)


class _WithSizes(TorchFunctionMode):
    """Gives the cuts the sizes that are left."""

    def __init__(self, sizes: Mapping[Cut, tuple[int, ...]]) -> None:
        super().__init__()
        self._sizes = sizes

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = cut_of(function, args, kwargs)
        if found is not None:
            x, call = found
            for cut, sizes in self._sizes.items():
                if call.dim == cut.dim and call == cut and x.shape[cut.dim] == sum(sizes):
                    return torch.split(x, list(sizes), cut.dim)
        return function(*args, **kwargs)


def cut_(module: nn.Module, cuts: Iterable[Plain]) -> None:
    """Let a module cut dimensions into parts of other sizes than its source code states.

    Its class becomes a subclass with the same name. The names of its parameters stay the same.

    Args:
        module: module that was thinned; it is changed in place.
        cuts: the cuts as they are now, with the new sizes of the parts.
    """
    sizes: dict[Cut, tuple[int, ...]] = dict(module.sizes_of_cuts) if isinstance(module, _Cutting) else {}
    for kind, dim, stated, new in cuts:
        now = tuple(stated) if isinstance(stated, list | tuple) else stated
        for cut, left in sizes.items():
            if cut.dim == dim and left == now:  # it was thinned before
                sizes[cut] = tuple(new)
        sizes[Cut(kind, dim, now)] = tuple(new)
    if not isinstance(module, _Cutting):
        module.__class__ = _cutting(type(module))
    vars(module)["sizes_of_cuts"] = sizes


class _Cutting:
    """First base of a module's class; the second one is the module's own class, of which copies and files know."""

    sizes_of_cuts: dict[Cut, tuple[int, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:]


def _cutting(kind: Any) -> Any:
    """A subclass of ``kind`` whose forward pass uses the sizes in the attribute ``sizes_of_cuts``."""
    if kind not in _MADE:

        @wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _WithSizes(self.sizes_of_cuts):
                return kind.forward(self, *args, **kwargs)

        names = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
        _MADE[kind] = type(kind.__name__, (_Cutting, kind), {**names, "forward": forward})
    return _MADE[kind]


_MADE: dict[type, type] = {}


def _new(kind: type) -> Any:
    made = _cutting(kind)
    return made.__new__(made)
