"""Which slices of a net's parameters must be removed together, found by following each channel through a forward pass.

DepGraph: towards any structural pruning, Fang et al. 2023 (arXiv:2301.12900), section 3: parameters whose sizes depend
on each other form a group. The paper follows layers. This module follows single channels. The net runs once on the meta
device, where tensors have shapes and no values, and for each operation of PyTorch's kernel library (ATen) a rule says
which channels of its inputs and outputs are the same (:mod:`project.compression.thinning.rules`). So one rule for
each operation serves all nets, and the time does not depend on the size of the images.

Every index of every dimension of a parameter or buffer has a number, its *slot*. Slots that only can go together are
joined. A channel of an activation has the slot of the parameter's index that made it. A dimension whose indices are not
followed, such as pixels, tokens and images, is ``None``.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Slots = np.ndarray[Any, np.dtype[np.int64]]
Axis = Slots | None
"""The slots of one dimension; ``None`` for a dimension that is not followed."""
Label = tuple[Axis, ...]
"""One axis for each dimension of a tensor."""
Rule = Callable[..., Any]
"""Called with the couplings, the result and the arguments of an operation. It joins slots, and returns the label of the
result, a list of labels for several results, or ``None`` if no dimension of the results is followed."""

MIXING = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "local_response_norm")
"""Functions of ``torch.nn.functional`` that may compute statistics over channels, by name."""

REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "norm")
"""Functions and methods of tensors that may compute a number over channels, by name."""


OF_A_HEAD = "the scale of attention depends on the width of a head"
"""Reason to keep the channels of a head."""


class Joined:
    """Slots, and which of them can only be removed together."""

    def __init__(self) -> None:
        self.num = 0
        self._pairs: list[tuple[Slots, Slots]] = []
        self._fixed: list[tuple[Slots, str]] = []

    def new(self, count: int) -> Slots:
        """New slots.

        Args:
            count: number of slots, 0 or more.
        """
        self.num += count
        return np.arange(self.num - count, self.num)

    def join(self, a: Axis, b: Axis, why: str = "it meets a tensor that is not sliced with it") -> None:
        """Let the slots at equal positions go together. If one axis is not followed, the other stays as it is.

        Args:
            a, b: axes of the same length.
            why: reason to keep the slots of one axis if the other is ``None``.
        """
        if a is None or b is None:
            self.fix(a, why)
            self.fix(b, why)
        elif a is not b:
            self._pairs.append((a, b))

    def fix(self, slots: Axis, why: str) -> None:
        """Let slots stay. The first reason counts.

        Args:
            slots: axis whose slots stay; nothing happens for ``None``.
            why: the reason, a main clause.
        """
        if slots is not None and slots.size:
            self._fixed.append((slots, why))

    def solve(self) -> tuple[Slots, dict[int, str]]:
        """The smallest slot of each slot's set, and the reason for each set that must stay, by its smallest slot."""
        root = np.arange(self.num)
        if self._pairs:
            a, b = (np.concatenate([pair[side].ravel() for pair in self._pairs]) for side in (0, 1))
            while True:
                ra, rb = root[a], root[b]
                if (ra == rb).all():
                    break
                np.minimum.at(root, np.maximum(ra, rb), np.minimum(ra, rb))
                while (root[root] != root).any():
                    root = root[root]
        reasons: dict[int, str] = {}
        for slots, why in self._fixed:
            for one in np.unique(root[slots.ravel()]).tolist():
                reasons.setdefault(one, why)
        return root, reasons


@dataclass(frozen=True)
class View:
    """A change of shape that states the size of a followed dimension, such as the number of heads of attention.

    Args:
        module: name of the module in whose forward pass this happens.
        sizes: sizes of the new dimensions that a dimension is cut into, or that dimensions are joined to.
        free: position of the one whose indices can be removed.
        slots: slots of this dimension.
        shape: the whole new shape.
        place: position in ``shape`` of the dimension whose indices can be removed.
    """

    module: str
    sizes: tuple[int, ...]
    free: int
    slots: Slots
    shape: tuple[int, ...]
    place: int


@dataclass(frozen=True)
class Split:
    """A split of a followed dimension into parts.

    Args:
        module: name of the module in whose forward pass this happens.
        parts: slots of each part.
    """

    module: str
    parts: tuple[Slots, ...]


@dataclass(frozen=True)
class Mixing:
    """A call of a function that computes statistics over channels.

    Args:
        function: name of the function in ``torch.nn.functional``.
        axes: slots of each dimension of its input over which it computes statistics, by the dimension.
    """

    function: str
    axes: dict[int, Slots]


@dataclass(frozen=True)
class Product:
    """The multiply-accumulates of one convolution or matrix product: a constant times the sizes of some dimensions.

    Args:
        module: name of the module in whose forward pass this happens.
        constant: multiply-accumulates for one channel of each axis, above 0.
        axes: slots of each followed dimension.
    """

    module: str
    constant: float
    axes: tuple[Slots, ...]


class ModuleStack:
    """The names of the modules whose forward passes are running, from the outermost to the innermost."""

    def __init__(self, net: nn.Module) -> None:
        self._names = [""]
        self._inputs: list[Any] = [()]
        self.entered = ""
        """The name of the module that was called last. It may have returned."""
        self._handles: list[Any] = []
        for name, module in net.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda _, args, name=name: self._enter(name, args)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str, args: Any) -> None:
        self._names.append(name)
        self._inputs.append(args)
        self.entered = name

    def _leave(self, *_: Any) -> None:
        self._names.pop()
        self._inputs.pop()

    @property
    def inputs(self) -> Iterable[Tensor]:
        """The tensors among the positional arguments of the innermost module."""
        return [each for each in flat(self._inputs[-1]) if isinstance(each, Tensor)]

    @property
    def name(self) -> str:
        """The name of the innermost module."""
        return self._names[-1]

    def close(self) -> None:
        """Remove the hooks from the net."""
        for handle in self._handles:
            handle.remove()


class MixingCalls(TorchFunctionMode):
    """Numbers the calls of :data:`MIXING` and :data:`REDUCTIONS` in each module. A subclass overrides :meth:`call`."""

    def __init__(self, stack: ModuleStack) -> None:
        super().__init__()
        self.stack = stack
        self._num: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        known = name in MIXING and getattr(torch.nn.functional, name) is function
        if known or (name in REDUCTIONS and args and function in (getattr(Tensor, name), getattr(torch, name, None))):
            key = (self.stack.name, self._num[self.stack.name])
            self._num[self.stack.name] += 1
            return self.call(key, name, function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def call(self, key: tuple[str, int], name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Compute one call.

        Args:
            key: name of the module, and number of the call in this module, from 0.
            name: name of the function.
            function: the function that was called.
            args: positional arguments of the call.
            kwargs: named arguments of the call.
        """
        return function(*args, **kwargs)


class Couplings(TorchDispatchMode):
    """Follows the channels of a net through one forward pass.

    Args:
        net: net in eval mode, on the meta device or, if it reads values, on the CPU; its parameters stay the same.
        image_shape: shape (C, H, W) of an image.
        rules: the rule of each operation, by the operation's name.
        tied: classes of attention whose inputs are as wide as their heads together, so that a head goes with the inputs
            at its place.

    Raises:
        Exception: whatever the net raises on this device.
    """

    def __init__(
        self,
        net: nn.Module,
        image_shape: tuple[int, int, int],
        rules: Mapping[str, Rule],
        tied: Collection[type[nn.Module]] = (),
    ) -> None:
        super().__init__()
        self._tied = tied
        self.tieable: dict[str, type[nn.Module]] = {}
        """The class of each module that cuts a dimension into heads, and whose inputs are as wide, by its name."""
        self.net, self._rules = net, rules
        self.joined = Joined()
        self.owned: dict[str, Label] = {}
        """The label of each parameter and buffer, by its name. Names of one shared tensor have the same label."""
        self.names: dict[int, str] = {}
        """The first name of each parameter and buffer, by the object's id."""
        self.views: list[View] = []
        self.splits: list[Split] = []
        self.head_cuts: set[tuple[int, int]] = set()
        """The number of heads and the width of a head wherever a dimension was cut into heads."""
        self.mixing: dict[tuple[str, int], Mixing] = {}
        """The calls that compute statistics over channels: module, and number of the call in the module."""
        self.products: list[Product] = []
        self.groups: dict[str, Slots] = {}
        """For each depthwise convolution the channels that it reads: there are as many groups as channels."""
        self.single_groups: dict[str, Slots] = {}
        """For each group norm with one channel in a group its channels."""
        self.unknown: set[str] = set()
        self._read: list[Slots] = []
        self._made: list[Slots] = []
        self._labels: dict[int, tuple[Any, Label]] = {}
        self._call: tuple[tuple[str, int], str] | None = None
        self._quiet = False
        self._if_used: dict[int, list[tuple[Axis, str]]] = {}
        named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
        for name, tensor in named:
            first = self.names.setdefault(id(tensor), name)
            self.owned[name] = self.owned[first] if first != name else tuple(map(self.joined.new, tensor.shape))
            self._set(tensor, self.owned[name])
        self.stack = ModuleStack(net)
        self.device = next((tensor.device.type for _, tensor in named), "meta")
        images = torch.ones(1, *image_shape, device=self.device)
        self._set(images, (None,) * 4)
        try:
            with torch.no_grad(), _no_fast_path(), _NotedCalls(self), self:
                output = net(images)
        finally:
            self.stack.close()
        self._use(output)
        for tensor in flat(output):
            for axis in self.of(tensor) if isinstance(tensor, Tensor) else ():
                self.joined.fix(axis, "it gives the net's output: its units are the logits")
        self.root, self.reasons = self.joined.solve()
        self.reads, self.makes = self._marked(self._read), self._marked(self._made)
        del self._labels, self._read, self._made, self._if_used

    def of(self, tensor: Tensor) -> Label:
        """The label of a tensor.

        Args:
            tensor: any tensor; one that was not seen before has no followed dimension.
        """
        found = self._labels.get(id(tensor))
        return found[1] if found is not None else (None,) * tensor.dim()

    def multiply(self, constant: float, read: Axis, made: Axis, *others: Axis) -> None:
        """Note a convolution or a matrix product.

        Args:
            constant: its multiply-accumulates for one channel of each followed axis.
            read: axis over which it sums.
            made: axis of its outputs.
            others: further axes, as of batches.
        """
        axes = [axis for axis in (read, made, *others) if axis is not None]
        self.products.append(Product(self.stack.name, constant, tuple(axes)))
        self._read += [] if read is None else [read]
        self._made += [] if made is None else [made]

    def tie(self, heads: Slots, size: int) -> None:
        """Tie heads to the inputs of the running module, if its class is among those to be tied.

        Args:
            heads: slots of the heads.
            size: number of channels of a head.
        """
        for tensor in self.stack.inputs:
            for axis in self.of(tensor):
                if axis is not None and len(axis) == len(heads) * size and (axis != np.repeat(heads, size)).any():
                    kind = self.tieable[self.stack.name] = type(self.net.get_submodule(self.stack.name))
                    if kind in self._tied:
                        self.joined.join(np.repeat(heads, size), axis)

    def mix(self, axes: dict[int, Axis], results: Iterable[Tensor] = ()) -> None:
        """Note that statistics are computed over channels.

        The channels stay unless this is done by one of the functions in MIXING and REDUCTIONS.

        Args:
            axes: axes by the dimension of the function's input.
            results: tensors that are computed. If they are given, the channels stay only if one of them is used.
        """
        known = {dim: axis for dim, axis in axes.items() if axis is not None}
        if known and self._call is not None:
            key, function = self._call
            self.mixing[key] = Mixing(function, known)
        else:
            for axis in known.values():
                self.stay(axis, "a sum or mean", results)

    def stay(self, axis: Axis, what: str, results: Iterable[Tensor] = ()) -> None:
        """Let an axis stay because something is computed over it.

        Args:
            axis: axis whose slots stay.
            what: the thing that is computed, such as "a mean".
            results: tensors that are the thing. If they are given, the axis stays only if one of them is used.
        """
        why = f"{what} in {self.stack.name or 'the net'} is taken over its units"
        for tensor in results:
            self._if_used.setdefault(id(tensor), []).append((axis, why))
        if not results:
            self.joined.fix(axis, why)

    def _use(self, values: Any) -> None:
        for tensor in flat(values):
            for axis, why in self._if_used.pop(id(tensor), ()):
                self.joined.fix(axis, why)

    def _set(self, tensor: Tensor, label: Label) -> None:
        assert len(label) == tensor.dim(), (tensor.shape, len(label))
        self._labels[id(tensor)] = (tensor, label)  # the tensor is kept, so that its id stays its own

    def _marked(self, axes: list[Slots]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        marked = np.zeros(self.joined.num, bool)
        for axis in axes:
            marked[axis] = True
        return marked

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._use((args, kwargs))
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        rule = self._rules.get(name) or self._rules.get(name.removesuffix("_"))  # an operation in place has no rule
        labels: Any = None
        if rule is not None and not self._quiet:
            labels = rule(self, result, *args, **kwargs)
        elif not self._quiet:
            for tensor in flat((args, kwargs)):
                for axis in self.of(tensor) if isinstance(tensor, Tensor) else ():
                    if axis is not None:
                        self.unknown.add(name)
                        self.joined.fix(
                            axis, f"it passes through {name} in {self.stack.name or 'the net'}, which has no rule"
                        )
        labels = labels if isinstance(labels, list) else [labels]
        for number, tensor in enumerate(each for each in flat(result) if isinstance(each, Tensor)):
            label = labels[number] if number < len(labels) else None
            self._set(tensor, (None,) * tensor.dim() if label is None else label)
        return result


class _NotedCalls(MixingCalls):
    """Tells the couplings which function of :data:`MIXING` is running."""

    def __init__(self, couplings: Couplings) -> None:
        super().__init__(couplings.stack)
        self._couplings = couplings

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "scaled_dot_product_attention" and (kwargs or {}).get("scale") is None:
            self._couplings.joined.fix(self._couplings.of(next(iter(flat((args, kwargs)))))[-1], OF_A_HEAD)
        return super().__torch_function__(function, types, args, kwargs)

    def call(self, key: tuple[str, int], name: str, function: Any, args: Any, kwargs: Any) -> Any:
        c = self._couplings
        before, c._call = c._call, (key, name)
        try:
            if name not in ("local_response_norm", "rms_norm"):
                return function(*args, **kwargs)
            label, c._quiet = c.of(args[0]), True  # these consist of operations that reduce channels
            result = function(*args, **kwargs)
            if name == "rms_norm":
                c._rules[name](c, result, *args, **kwargs)
            else:
                c.mix({1: label[1]})
            c._set(result, label)
            return result
        finally:
            c._call, c._quiet = before, False


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Let torch's attention compute from its layers' operations, and not in one kernel that has no rule."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def flat(value: Any) -> Iterable[Any]:
    """All values within nested lists, tuples and dictionaries.

    Args:
        value: any value, also within lists.
    """
    if isinstance(value, list | tuple):
        for each in value:
            yield from flat(each)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value
