"""Other sizes for splits whose sizes are numbers in the source code of a module.

``torch.split(x, [8, 16], 1)`` in a forward pass states the widths of two groups of channels, and no attribute does.
When some of these channels are removed, the source code stays. So the class of the module becomes a subclass. It runs
the module's own forward pass in a mode that gives such a call the sizes that are left (:func:`cut_`). A call is known
by its numbers, its dimension, and the size of this dimension after thinning. A list of sizes that does not add up to
the size of the dimension is an error in torch, so that no valid call with a list ever changes.

``x.split(8, 1)``, ``x.chunk(3, 1)`` and ``x[:, :8]`` get other sizes in the same way, but they are valid for any size.
The mode also sees the calls of the modules inside. Where two such calls could be mistaken for each other, the trace
keeps their channels (:meth:`project.compression.thinning.couplings.Couplings.cut`). It sees only calls in evaluation.
A net that computes the numbers, as in ``x[:, : x.shape[1] // 2]``, never makes the calls that are known: the trial
finds this and refuses the units (:func:`unused`).
"""

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Cut(NamedTuple):
    """A call that cuts a dimension into parts, as the source code states it.

    Args:
        kind: ``"split"``, ``"chunk"``, or ``"slice"`` for the middle of three parts.
        dim: the dimension, 0 or more.
        stated: the sizes of all parts, the size of each part (split), the number of parts (chunk), or where the middle
            begins and ends (slice; ``None`` for the end of the dimension).
    """

    kind: str
    dim: int
    stated: tuple[int | None, ...] | int

    @property
    def is_exact(self) -> bool:
        """Whether the call is an error for a dimension of another size."""
        return self.kind == "split" and isinstance(self.stated, tuple)

    def gives(self, sizes: Sequence[int]) -> bool:
        """Whether the call as it stands cuts the dimension that has these parts into them."""
        if isinstance(self.stated, tuple):
            return self.kind == "split" and self.stated == (*sizes,)
        whole = torch.empty(sum(sizes), device="meta")
        parts = whole.split(self.stated) if self.kind == "split" else whole.chunk(self.stated)
        return [*map(len, parts)] == [*sizes]


Plain = list[Any]
"""A cut and the sizes of its parts after thinning, as plain values: ``[kind, dim, stated, sizes]``."""

_KINDS: dict[Callable[..., Any], str] = {
    torch.split: "split",
    torch.split_with_sizes: "split",
    torch.chunk: "chunk",
    Tensor.split: "split",
    Tensor.split_with_sizes: "split",
    Tensor.chunk: "chunk",
    torch.narrow: "narrow",
    Tensor.narrow: "narrow",
    Tensor.__getitem__: "index",
    operator.getitem: "index",
}


def cut_of(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Cut] | None:
    """The tensor that a call cuts, and the cut; ``None`` for a call of another function.

    Args:
        function: function of torch, or method of a tensor.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
    """
    kind = _KINDS.get(function)
    if kind is None:
        return None
    if kind in ("narrow", "index"):
        return _slice_of(*args, **kwargs) if kind == "narrow" else _index_of(*args)
    named = {**dict(zip(("x", "stated", "dim"), args, strict=False)), **kwargs}
    dim = named.pop("dim", 0)
    (x,) = (each for each in named.values() if isinstance(each, Tensor))
    (stated,) = (each for each in named.values() if not isinstance(each, Tensor))
    return x, Cut(kind, dim % x.dim(), tuple(stated) if isinstance(stated, list | tuple) else stated)


def _slice_of(input: Tensor, dim: int, start: Any, length: int) -> tuple[Tensor, Cut] | None:
    """``torch.narrow`` as a cut, if it begins at a number."""
    begins = isinstance(start, int) and start >= 0
    return (input, Cut("slice", dim % input.dim(), (start, start + length))) if begins else None


def _index_of(x: Any, index: Any) -> tuple[Tensor, Cut] | None:
    """``x[:, 4:8]`` as a cut. All other indices must be ``:`` and ``...``."""
    index = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    taken = [each for each in index if not (each is ... or (isinstance(each, slice) and each == whole))]
    if not isinstance(x, Tensor) or len(taken) != 1 or not isinstance(taken[0], slice) or taken[0].step is not None:
        return None
    begin, end = taken[0].start, taken[0].stop
    place = index.index(taken[0])
    dim = place - len(index) + x.dim() if ... in index[:place] else place
    known = all(each is None or isinstance(each, int) for each in (begin, end))
    return (x, Cut("slice", dim, (begin or 0, end))) if known else None


class _WithSizes(TorchFunctionMode):
    """Gives the cuts the sizes that are left."""

    def __init__(self, sizes: Mapping[Cut, tuple[int, ...]], used: set[tuple[int, tuple[int, ...]]] | None) -> None:
        super().__init__()
        self._sizes, self._used = sizes, used

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = cut_of(function, args, kwargs)
        if found is not None:
            x, call = found
            for cut, sizes in self._sizes.items():
                if call.dim == cut.dim and call == cut and x.shape[cut.dim] == sum(sizes):
                    if self._used is not None:
                        _refuse_checkpoint()
                        self._used.add((cut.dim, sizes))
                    if cut.kind == "slice":
                        return torch.narrow(x, cut.dim, sizes[0], sizes[1])
                    return torch.split(x, list(sizes), cut.dim)
        return function(*args, **kwargs)


def _refuse_checkpoint() -> None:
    """Refuse a call that ``torch.utils.checkpoint`` repeats in the backward pass, outside of the module's forward pass.

    Raises:
        RuntimeError: if a function of the running module is such a call. Modules inside may be.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise RuntimeError("torch.utils.checkpoint would repeat a split or slice without its new sizes")
        frame = frame.f_back  # type: ignore[assignment]


def cut_(module: nn.Module, cuts: Iterable[Plain]) -> None:
    """Let a module cut dimensions into parts of other sizes than its source code states.

    Its class becomes a subclass with the same name. The names of its parameters stay the same.

    Args:
        module: module that was thinned; it is changed in place.
        cuts: the cuts as they are now, with the new sizes of the parts.
    """
    before: dict[Cut, tuple[int, ...]] = module.sizes_of_cuts if isinstance(module, _Cutting) else {}
    sizes = dict(before)
    for kind, dim, stated, new in cuts:
        now = tuple(stated) if isinstance(stated, list | tuple) else stated
        for cut, left in before.items():
            present = (left[0], left[0] + left[1]) if cut.kind == "slice" else left
            if cut.dim == dim and present == now and (kind == "slice") == (cut.kind == "slice"):  # thinned before
                sizes[cut] = tuple(new)
        sizes[Cut(kind, dim, now)] = tuple(new)
    if not isinstance(module, _Cutting):
        module.__class__ = _cutting(type(module))
    vars(module)["sizes_of_cuts"] = sizes


def note_uses_(net: nn.Module) -> None:
    """Let the modules of a net note which of the new sizes their forward passes use.

    Args:
        net: net after it was thinned; only its notes change.
    """
    for module in net.modules():
        if isinstance(module, _Cutting):
            module.used_cuts = set()


def unused(net: nn.Module, cuts: Mapping[str, Iterable[Plain]]) -> dict[str, list[Plain]]:
    """The cuts that no forward pass since :func:`note_uses_` has used: the net computes their numbers anew.

    Args:
        net: net after it was thinned.
        cuts: the cuts by the name of their module, with their new sizes.
    """
    used: dict[str, Any] = {path: getattr(net.get_submodule(path), "used_cuts", None) or () for path in cuts}
    return {path: [cut for cut in of if (cut[1], tuple(cut[3])) not in used[path]] for path, of in cuts.items()}


class _Cutting:
    """First base of a module's class; the second one is the module's own class, of which copies and files know."""

    sizes_of_cuts: dict[Cut, tuple[int, ...]]
    """The sizes of the parts, by the cut as the source code states it."""
    used_cuts: set[tuple[int, tuple[int, ...]]] | None = None
    """The dimension and the sizes of each cut that was given other sizes, if somebody wants to know."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:]


def _cutting(kind: Any) -> Any:
    """A subclass of ``kind`` whose forward pass uses the sizes in the attribute ``sizes_of_cuts``."""
    if kind not in _MADE:

        @wraps(kind.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _WithSizes(self.sizes_of_cuts, self.used_cuts):
                return kind.forward(self, *args, **kwargs)

        names = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
        _MADE[kind] = type(kind.__name__, (_Cutting, kind), {**names, "forward": forward})
    return _MADE[kind]


_MADE: dict[type, type] = {}


def _new(kind: type) -> Any:
    """An empty module of the subclass, for copies."""
    made = _cutting(kind)
    return made.__new__(made)
