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

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from project.compression.thinning.calls import MixingCalls, ModuleStack, flat
from project.compression.thinning.cuts import Cut, cut_of
from project.compression.thinning.slots import Axis, Joined, Label, Mixing, Product, Slots, Split, View

Rule = Callable[..., Any]
"""Called with the couplings, the result and the arguments of an operation. It joins slots, and returns the label of the
result, a list of labels for several results, or ``None`` if no dimension of the results is followed."""

OF_A_HEAD = "the scale of attention depends on the width of a head"
"""Reason to keep the channels of a head."""


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
        self.cuts: list[tuple[Cut, Split]] = []
        """The cuts whose numbers may stand in the source code."""
        self.running_cut: Cut | None = None
        """The cut that is being computed."""
        self.head_cuts: set[tuple[int, int]] = set()
        """The number of heads and the width of a head wherever a dimension was cut into heads."""
        self.mixing: dict[tuple[str, int], Mixing] = {}
        """The calls that compute statistics over channels: module, and number of the call in the module."""
        self.products: list[Product] = []
        self.groups: dict[str, Slots] = {}
        """For each depthwise convolution the channels that it reads: there are as many groups as channels."""
        self.single_groups: dict[str, Slots] = {}
        """For each group norm with one channel in a group its channels."""
        self._read: list[Slots] = []
        self._made: list[Slots] = []
        self._labels: dict[int, tuple[Any, Label]] = {}
        self._call: tuple[tuple[str, int], str] | None = None
        self._cut_calls: list[tuple[Cut, tuple[str, ...], tuple[Slots, ...], bool]] = []
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
        del self._labels, self._read, self._made, self._if_used, self._cut_calls

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

    def cut(self, parts: Sequence[Slots], fits: bool = False) -> bool:
        """Note that the running call cuts a dimension into parts.

        Calls with the same numbers in one module, or in a module and one inside, cannot be told apart. They lose the
        same channels; they keep all of them if their parts have other sizes.

        Args:
            parts: slots of each part; empty if the dimension is not followed.
            fits: whether the call fits any size of the dimension, or gets its numbers from an attribute.

        Returns:
            Whether the call is one to which thinning can give other sizes.
        """
        call, names = self.running_cut, self.stack.names
        if call is None:
            return False
        fits = fits or not parts
        for cut, others, known, fitted in self._cut_calls:
            near = names[-1] == others[-1] or (not call.is_exact and (names[-1] in others or others[-1] in names))
            if cut != call or not near or (fits and fitted):
                continue
            if [*map(len, known)] == [*map(len, parts)]:
                for one, other in zip(known, parts, strict=True):
                    self.joined.join(one, other)
            elif not call.is_exact:
                for part in (*known, *parts):
                    self.joined.fix(part, f"{names[-1] or 'the net'} cuts it as it cuts another tensor")
        self._cut_calls.append((call, names, tuple(parts), fits))
        if not fits:
            self.cuts.append((call, Split(names[-1], tuple(parts))))
        return True

    def mix(self, axes: dict[int, Axis], values: float, results: Iterable[Tensor] = ()) -> None:
        """Note that statistics are computed over channels.

        The channels stay unless this is done by one of the functions in MIXING and REDUCTIONS.

        Args:
            axes: axes by the dimension of the function's input.
            values: number of values that one channel adds to a statistic; infinity if each has its own statistic.
            results: tensors that are computed. If they are given, the channels stay only if one of them is used.
        """
        known = {dim: axis for dim, axis in axes.items() if axis is not None}
        if known and self._call is not None:
            key, function = self._call
            self.mixing[key] = Mixing(function, known, values)
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
        found = cut_of(function, args, kwargs or {})
        self._couplings.running_cut = None if found is None else found[1]
        try:
            return super().__torch_function__(function, types, args, kwargs)
        finally:
            self._couplings.running_cut = None

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
                c.mix({1: label[1]}, 1)
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
