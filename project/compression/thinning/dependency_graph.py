"""The units that can be removed from a net, and the slices of other modules that must be removed with them.

DepGraph: towards any structural pruning, Fang et al. 2023 (arXiv:2301.12900), section 3: layers whose widths depend on
each other form a group. The graph and the groups come from the authors' package ``torch-pruning``, which is run on a
copy of the net.

Our addition to the paper: a group is accepted only if its removal is exact. This means that units whose own parameters
are zero add nothing to any other unit. There are three conditions:

- Every operation between the units and the layers that read them treats each channel on its own. A list names the
  operations that do; local response norm, group norm and layer norm do not.
- Zero stays zero. Half of the units' parameters are set to zero, and in a forward pass their readers must get exact
  zeros from them. An activation with act(0) != 0 fails here, and so would a wrong trace.
- Each module in the group has its own weights and runs once in a forward pass. A convolution or linear layer is one of
  torch's own classes: a subclass may use its weight in another way.

The trace of one layer makes a limited number of indices, so that its time and memory are limited too. A change of shape
within a loop of residual connections, as in a Swin transformer, would make indices without end. A layer whose trace
goes beyond the limit is refused.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from project.compression.plain_layers import copy_of, is_plain

_MIXING_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
# Names of autograd nodes, in three groups: activations and arithmetic (whether 0 stays 0 is measured later); poolings
# and other operations over pixels; changes of shape.
_CHANNELWISE = re.compile(
    r"(Abs|Add|Celu|Clamp|ClampMax|ClampMin|Div|Elu|Exp|Expm1|Gelu|Hardshrink|Hardsigmoid|Hardswish|Hardtanh|LeakyRelu"
    r"|Log1p|LogSigmoid|Mish|Mul|NativeBatchNorm|Neg|Pow|PreluKernel|Relu|Sigmoid|Silu|Softplus|Softshrink|Sqrt|Sub"
    r"|Tanh|Threshold|Where"
    r"|AdaptiveAvgPool2D|AdaptiveMaxPool2D|AvgPool2D|MaxPool2DWithIndices|Mean|Sum|UpsampleBilinear2D|UpsampleNearest2D"
    r"|Cat|Clone|ReshapeAlias|Slice|Squeeze|ToCopy|UnsafeView|Unsqueeze|View)Backward\d*"
)


@dataclass(frozen=True)
class UnitGroup:
    """The modules that depend on the units of one layer.

    Args:
        num: number of units, 1 or more.
        outputs: names of the modules whose parameters have these units as their first dimension, in the same order: the
            layer, its norms, and coupled layers.
        inputs: pairs (number of the unit, number of the reading layer's input), by the name of each layer that reads
            the units. A unit has several inputs if its channel is flattened.
    """

    num: int
    outputs: tuple[str, ...]
    inputs: dict[str, list[tuple[int, int]]]


class _InexactError(Exception):
    """The units of a layer cannot be removed exactly; the message is the reason."""


def trace(net: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[str, UnitGroup], dict[str, str]]:
    """Find the layers whose units can be removed exactly.

    Args:
        net: a net that takes images ``[N, C, H, W]``; it is copied and not changed.
        image_shape: shape (C, H, W) of an image.

    Returns:
        The group of each such layer, and for every other convolution or linear layer the reason why its units cannot be
        removed; both by the layer's name.
    """
    with torch.inference_mode(False):
        tracer = _Tracer(evaluated_copy(net), example_images(image_shape))
    return tracer.groups, tracer.reasons


def evaluated_copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32, on the CPU.

    Its activations do not work in place, because the trace does not see activations that do.
    """
    copied = copy_of(net).cpu().float().eval()
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return copied


def example_images(image_shape: tuple[int, int, int], batch: int = 1) -> Tensor:
    """Random images ``[batch, C, H, W]``. They are the same in each call, and no global random number is drawn."""
    return torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(0))


def mask_(net: nn.Module, name: str, units: list[int]) -> None:
    """Set the parameters of some units of the module ``name`` to zero, in place."""
    with torch.no_grad():
        for parameter in net.get_submodule(name).parameters(recurse=False):
            parameter[units] = 0


@dataclass
class _Tracer:
    """Traces one net, which is changed by it.

    Args:
        net: a copy of the net, in eval mode.
        images: a batch of images ``[N, C, H, W]`` for the forward passes.
        groups: the groups found so far, by the name of their layer.
        reasons: the reasons found so far why a layer has no group, by the layer's name.
    """

    net: nn.Module
    images: Tensor
    groups: dict[str, UnitGroup] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.net.named_modules()}
        self.num_calls: Counter[nn.Module] = Counter()
        self.mixing: dict[Any, str] = {}  # for each norm that mixes channels: autograd node of its output, description
        self.inner: set[Any] = set()  # autograd nodes of the product in a linear layer that is called with tokens
        self.unmapped: set[Any] = set()  # operations whose channels torch-pruning cannot follow
        self.failure = ""  # the reason why the net as a whole cannot be traced
        self.mapped = False  # whether torch-pruning has computed its maps of indices
        self.num_indices = 0  # number of indices that it has made for the present layer
        widths = (sum(m.weight.shape[:2]) for m in self.net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        self.max_indices = 50_000 + 20 * sum(widths)  # five times what VGG-11 and DenseNet-121 need, or more
        self.num_owners = Counter(id(p) for _, p in self.net.named_parameters(remove_duplicate=False))
        with _silent(), self._limited():
            self.graph = self._build()
            for name, module in self.net.named_modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    try:
                        self.groups[name] = self._group(module)
                    except _InexactError as reason:
                        self.reasons[name] = str(reason)
        self._refuse_what_does_not_vanish()

    def _build(self) -> Any:
        """The dependency graph of ``torch-pruning``. It follows the autograd graph of one forward pass."""
        import torch_pruning  # imported here because only thinning needs it

        for parameter in self.net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # frozen layers too, or autograd does not see them
        handles = [module.register_forward_hook(self._note) for module in self.net.modules()]
        ran: list[bool] = []

        def forward(net: nn.Module, images: Tensor) -> Any:
            output = net(images)
            ran.append(True)
            return output

        graph = torch_pruning.DependencyGraph()
        try:
            with torch.enable_grad():
                return graph.build_dependency(self.net, self.images, forward_fn=forward, verbose=False)
        except Exception as error:
            if not ran:
                raise
            self.failure = f"torch-pruning fails to trace the net ({type(error).__name__}: {error})"
            return graph
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Count the indices that ``torch-pruning`` makes, and let it compute its maps of indices once.

        The operations at which it fails to map channels are noted, and it goes on with the others. It divides by a
        number of channels that it guessed wrong, for example at the views of a channel shuffle.
        """
        from torch_pruning import _helpers
        from torch_pruning.dependency import index_mapping

        tracer, before = self, dict(vars(index_mapping))
        index, update_all = _helpers._HybridIndex, index_mapping.update_index_mapping

        class Counted(index):  # type: ignore[misc, valid-type]
            def __new__(cls, idx: int, root_idx: int) -> "Counted":
                tracer.num_indices += 1
                if tracer.num_indices > tracer.max_indices:
                    raise _InexactError("its units pass through a loop in which the trace finds no end")
                return index.__new__(cls, idx, root_idx)

        def noting(update: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
            def call(graph: Any, node: Any) -> None:
                try:
                    update(graph, node)
                except Exception:  # whatever its code raises, the operation is refused
                    tracer.unmapped.add(node)

            return call

        def update_once(graph: Any) -> None:
            if not tracer.mapped:
                tracer.mapped = True
                update_all(graph)

        updates = [name for name in before if re.fullmatch("update_(?!index_mapping).*", name)]
        vars(index_mapping).update({name: noting(before[name]) for name in updates}, update_index_mapping=update_once)
        _helpers._HybridIndex = Counted
        try:
            yield
        finally:
            vars(index_mapping).update(before)
            _helpers._HybridIndex = index

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: count the module's calls, and remember the norms that mix channels."""
        self.num_calls[module] += 1
        if isinstance(module, nn.Linear) and (inner := _product_of_tokens(output)) is not None:
            self.inner.add(inner)
        if isinstance(module, _MIXING_NORMS):
            self.mixing[output.grad_fn] = self._describe(module)

    def _describe(self, module: nn.Module) -> str:
        return f"{self.names[module]} ({type(module).__name__})"

    def _group(self, layer: nn.Conv2d | nn.Linear) -> UnitGroup:
        """The group of one layer's units.

        ``torch-pruning`` lists all that would change if all units of the layer were removed. Each item of the list is a
        module or an operation with pairs of indices: the number of the unit in the layer, and its number there.

        Raises:
            _InexactError: if an item does not treat each unit on its own.
        """
        self._check_weights(layer)
        if self.failure:
            raise _InexactError(self.failure)
        if layer not in self.graph.module2node:
            raise _InexactError("it has no part in the output, so that the layers that read its units are not known")
        num, self.num_indices = layer.weight.shape[0], 0
        prune_out = self.graph.get_pruner_of_module(layer).prune_out_channels
        try:
            items = list(self.graph.get_pruning_group(layer, prune_out, list(range(num))))
        except _InexactError:
            raise
        except Exception as error:
            raise _InexactError(f"torch-pruning fails to follow its units ({type(error).__name__}: {error})") from error
        # Two reasons to refuse the group are looked for in the whole list first, whatever kind of item has them.
        for item in items:
            node = item.dep.target
            if node in self.unmapped:
                raise _InexactError(f"its units pass through {node.grad_fn.name()}, where the trace loses them")
            if node.grad_fn in self.mixing:
                raise _InexactError(f"its channels are mixed in the statistics of {self.mixing[node.grad_fn]}")
            if node.type.name == "CONCAT" and node.module.offsets is None:
                raise _InexactError(
                    "the position of its units in a concatenation is not known (is the concatenation flattened next?)"
                )
        outputs: list[str] = []
        inputs: dict[str, list[tuple[int, int]]] = {}
        for item in items:
            node, module = item.dep.target, item.dep.target.module
            pairs = list(zip(item.root_idxs, item.idxs, strict=True))
            # A layer that reads the units loses inputs: slices of the weight's second dimension.
            if isinstance(module, nn.Conv2d | nn.Linear) and self.graph.is_in_channel_pruning_fn(item.dep.handler):
                self._check_weights(module)
                inputs[self.names[module]] = pairs
                continue
            if not node.outputs:
                raise _InexactError("it gives the net's output: its units are the logits")
            # The layer itself, its norms, and coupled layers lose units: slices of the first dimension. Each unit must
            # have the same number there; it has not if the module sees a concatenation of several layers.
            if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm | _InstanceNorm):
                self._check_weights(module)
                if pairs != [(unit, unit) for unit in range(module.weight.shape[0])]:
                    raise _InexactError(f"its units meet those of other layers in {self._describe(module)}")
                outputs.append(self.names[module])
            else:
                self._check_operation(node)
        return UnitGroup(num, tuple(outputs), inputs)

    def _check_weights(self, module: Any) -> None:
        """Refuse a module whose weights cannot be sliced, or cannot be sliced without changing something else.

        Raises:
            _InexactError: for such a module.
        """
        who = self._describe(module)
        if "weight" not in module._parameters:
            raise _InexactError(f"the weight of {who} is computed from other parameters")
        if isinstance(module, nn.Conv2d | nn.Linear) and not is_plain(module):
            raise _InexactError(f"{who} is a subclass that may compute otherwise than torch's layer")
        if module.weight is None:
            raise _InexactError(f"{who} has no scale and shift that could be zero for the unit (affine=False)")
        if getattr(module, "groups", 1) > 1:
            raise _InexactError(f"{who} is a grouped convolution")
        if any(self.num_owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            raise _InexactError(f"{who} shares its weights with another layer")
        if self.num_calls[module] > 1:
            raise _InexactError(f"{who} runs more than once in a forward pass")

    def _check_operation(self, node: Any) -> None:
        """Refuse an operation that may mix channels, or that adds parameters of its own.

        Raises:
            _InexactError: for such an operation.
        """
        if isinstance(node.module, nn.Parameter):
            raise _InexactError("its units meet a parameter that belongs to no layer")
        if isinstance(node.module, nn.PReLU) and node.module.num_parameters > 1:
            raise _InexactError(f"its units have slopes of their own in {self._describe(node.module)}")
        # A node without inputs is a view of a layer's weight, before the layer uses it. It has no channels to mix.
        if node.grad_fn in self.inner:
            return
        if node.inputs and (not _CHANNELWISE.fullmatch(node.grad_fn.name()) or _pools_channels(node.grad_fn)):
            raise _InexactError(f"its units pass through {node.grad_fn.name()}, which may mix channels")

    def _refuse_what_does_not_vanish(self) -> None:
        """Remove the groups whose readers do not get exact zeros from units that have zero parameters.

        The test sets half of the units of every group to zero, all groups at once, and runs the net. This changes the
        net.
        """
        masked = {layer: random_half(group) for layer, group in self.groups.items()}
        for layer, group in self.groups.items():
            for name in group.outputs:
                mask_(self.net, name, sorted(masked[layer]))
        alive = self._nonzero_inputs()
        for layer, group in list(self.groups.items()):
            for reader, pairs in group.inputs.items():
                if any(alive[reader][index] for unit, index in pairs if unit in masked[layer]):
                    self.groups.pop(layer, None)
                    self.reasons[layer] = (
                        f"its units are not 0 if their weights are 0: {reader} still reads other values than 0 from "
                        "them (is there an activation with act(0) != 0 before it, or is a constant added?)"
                    )

    def _nonzero_inputs(self) -> dict[str, list[bool]]:
        """For every layer that runs, and each of its inputs, whether the layer read any value other than zero."""
        alive: dict[str, list[bool]] = {}

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            images = args[0].movedim(1 if isinstance(module, nn.Conv2d) else -1, 0)  # the inputs first: [in, ...]
            alive[self.names[module]] = (images.flatten(1) != 0).any(dim=1).tolist()

        for module in self.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_pre_hook(note)
        with torch.no_grad():
            self.net(self.images)
        return alive


def random_half(group: UnitGroup) -> set[int]:
    """The number 0 and a random half of the other units, but not all; the same numbers for layers that share the units.

    The choice is random to find wrong offsets in a trace. These are mostly even, and would hide in a regular pattern.
    """
    draw = Random(min(group.outputs))
    chosen = {0} | {unit for unit in range(1, group.num) if draw.random() < 0.5}
    return chosen - {group.num - 1} if group.num > 1 else chosen


def _pools_channels(grad_fn: Any) -> bool:
    """Whether the operation is a mean or sum over the batch or the channels, not only over the two pixel dimensions."""
    if not grad_fn.name().startswith(("Mean", "Sum")):
        return False
    dims, num_dims = getattr(grad_fn, "_saved_dim", (0,)), len(grad_fn._saved_self_sym_sizes)
    # Autograd stores a negative dimension as an unsigned 64-bit number: -1 is 2^64 - 1.
    return any((dim - 2**64 if dim >= 2**63 else dim) % num_dims < 2 for dim in dims)


def _product_of_tokens(output: Any) -> Any:
    """The autograd node of a linear layer's product, if views of tokens ``[N, L, C]`` surround it; otherwise None.

    ``torch-pruning`` takes the last view for the layer, and the product for an operation of its own.
    """
    view = getattr(output, "grad_fn", None)
    if view is None or not view.name().startswith(("ViewBackward", "UnsafeViewBackward")):
        return None
    product = view.next_functions[0][0]
    return product if product is not None and product.name().startswith(("AddmmBackward", "MmBackward")) else None


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the warnings and the prints of ``torch-pruning``."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
