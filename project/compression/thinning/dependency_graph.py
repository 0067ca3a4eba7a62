"""Which units can be removed from a net, and which slices of which modules go with them.

DepGraph: towards any structural pruning, Fang et al. 2023 (arXiv:2301.12900), section 3: layers whose widths are bound
to each other form a group. The graph and the groups are those of the authors' package ``torch-pruning``; it only looks
at a copy of the net. What the paper does not have: a group is kept only if its removal is exact, that is, if units
whose own parameters are zero add nothing to any other. Three things are asked for:

- every operation between the units and their readers treats each channel on its own (a list of known ones; local
  response norm, group norm and layer norm do not);
- nothing makes something of nothing: with half of the units' parameters at zero, a forward pass is looked at, and the
  readers must get exact zeros there (an activation with act(0) != 0 fails, and so would a wrong trace);
- each module in the group has its own weights and runs once.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from io import StringIO
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

_MIXING_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
# Names of autograd nodes. Activations and arithmetic (whether 0 stays 0 is measured); over pixels; shapes.
_CHANNELWISE = re.compile(
    r"(Abs|Add|Celu|Clamp|ClampMax|ClampMin|Div|Elu|Exp|Expm1|Gelu|Hardshrink|Hardsigmoid|Hardswish|Hardtanh|LeakyRelu"
    r"|Log1p|LogSigmoid|Mish|Mul|NativeBatchNorm|Neg|Pow|PreluKernel|Relu|Sigmoid|Silu|Softplus|Softshrink|Sqrt|Sub"
    r"|Tanh|Threshold|Where"
    r"|AdaptiveAvgPool2D|AdaptiveMaxPool2D|AvgPool2D|MaxPool2DWithIndices|Mean|Sum|UpsampleBilinear2D|UpsampleNearest2D"
    r"|Cat|Clone|ReshapeAlias|Slice|Squeeze|ToCopy|UnsafeView|Unsqueeze|View)Backward\d*"
)


@dataclass(frozen=True)
class UnitGroup:
    """All that hangs on the units of one layer.

    Args:
        num: number of units.
        outputs: modules whose first dimension is these units, in their order: the layer, its norms, coupled layers.
        inputs: (unit, input) pairs of each layer that reads the units; a flattened channel is several inputs.
    """

    num: int
    outputs: tuple[str, ...]
    inputs: dict[str, list[tuple[int, int]]]


class _InexactError(Exception):
    """Why the units of a layer stay."""


def trace(net: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[str, UnitGroup], dict[str, str]]:
    """Groups of the layers whose units can be removed exactly, and for all other layers the reason why not.

    Args:
        net: takes images ``[N, C, H, W]``; it is copied and stays as it is.
        image_shape: (C, H, W).
    """
    with torch.inference_mode(False):
        tracer = _Tracer(evaluated_copy(net), example_images(image_shape))
    return tracer.groups, tracer.reasons


def evaluated_copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode and float32 on the CPU. Activations work out of place: in place they hide in the graph."""
    copied = deepcopy(net).cpu().float().eval()
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return copied


def example_images(image_shape: tuple[int, int, int], batch: int = 1) -> Tensor:
    """The same random images each time, without a draw from the global generator."""
    return torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(0))


def mask_(net: nn.Module, name: str, units: list[int]) -> None:
    """Zero these units' slices of the parameters of the module ``name``, in place."""
    with torch.no_grad():
        for parameter in net.get_submodule(name).parameters(recurse=False):
            parameter[units] = 0


@dataclass
class _Tracer:
    """One look at a net that may be spoiled."""

    net: nn.Module
    images: Tensor
    groups: dict[str, UnitGroup] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.net.named_modules()}
        self.num_calls: Counter[nn.Module] = Counter()
        self.mixing: dict[Any, str] = {}  # autograd node of the output -> description of the norm
        self.num_owners = Counter(id(p) for _, p in self.net.named_parameters(remove_duplicate=False))
        with _silent():
            self.graph = self._build()
            for name, module in self.net.named_modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    try:
                        self.groups[name] = self._group(module)
                    except _InexactError as reason:
                        self.reasons[name] = str(reason)
        self._refuse_what_does_not_vanish()

    def _build(self) -> Any:
        import torch_pruning  # late: only thinning needs it

        for parameter in self.net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # also frozen layers: autograd is the trace
        handles = [module.register_forward_hook(self._note) for module in self.net.modules()]
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                self.net, self.images, forward_fn=lambda net, images: net(images), verbose=False
            )
        for handle in handles:
            handle.remove()
        return graph

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.num_calls[module] += 1
        if isinstance(module, _MIXING_NORMS):
            self.mixing[output.grad_fn] = self._describe(module)

    def _describe(self, module: nn.Module) -> str:
        return f"{self.names[module]} ({type(module).__name__})"

    def _group(self, layer: nn.Conv2d | nn.Linear) -> UnitGroup:
        self._check_weights(layer)
        if layer not in self.graph.module2node:
            raise _InexactError("it has no part in the output, so that nothing tells who reads its units")
        num = layer.weight.shape[0]
        prune_out = self.graph.get_pruner_of_module(layer).prune_out_channels
        items = list(self.graph.get_pruning_group(layer, prune_out, list(range(num))))
        for item in items:
            node = item.dep.target
            if node.grad_fn in self.mixing:
                raise _InexactError(f"its channels are mixed in the statistics of {self.mixing[node.grad_fn]}")
            if node.type.name == "CONCAT" and node.module.offsets is None:
                raise _InexactError("nothing tells where its units lie in a concatenation (is that flattened next?)")
        outputs: list[str] = []
        inputs: dict[str, list[tuple[int, int]]] = {}
        for item in items:
            node, module = item.dep.target, item.dep.target.module
            pairs = list(zip(item.root_idxs, item.idxs, strict=True))
            if isinstance(module, nn.Conv2d | nn.Linear) and self.graph.is_in_channel_pruning_fn(item.dep.handler):
                self._check_weights(module)
                inputs[self.names[module]] = pairs
                continue
            if not node.outputs:
                raise _InexactError("it gives the net's output: its units are the logits")
            if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm | _InstanceNorm):
                self._check_weights(module)
                if pairs != [(unit, unit) for unit in range(module.weight.shape[0])]:
                    raise _InexactError(f"its units meet those of other layers in {self._describe(module)}")
                outputs.append(self.names[module])
            else:
                self._check_operation(node)
        return UnitGroup(num, tuple(outputs), inputs)

    def _check_weights(self, module: Any) -> None:
        """Refuse modules whose weights can not be sliced, or not for this group alone."""
        who = self._describe(module)
        if "weight" not in module._parameters:
            raise _InexactError(f"the weight of {who} is computed from other parameters")
        if module.weight is None:
            raise _InexactError(f"{who} has no scale and shift that could be zero with the unit (affine=False)")
        if getattr(module, "groups", 1) > 1:
            raise _InexactError(f"{who} is a grouped convolution")
        if any(self.num_owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            raise _InexactError(f"{who} shares its weights with another layer")
        if self.num_calls[module] > 1:
            raise _InexactError(f"{who} runs more than once in a forward pass")

    def _check_operation(self, node: Any) -> None:
        if isinstance(node.module, nn.Parameter):
            raise _InexactError("its units meet a parameter that belongs to no layer")
        if isinstance(node.module, nn.PReLU) and node.module.num_parameters > 1:
            raise _InexactError(f"its units have slopes of their own in {self._describe(node.module)}")
        if node.inputs and (not _CHANNELWISE.fullmatch(node.grad_fn.name()) or _pools_channels(node.grad_fn)):
            # Without inputs it is a view of some layer's weight, on its way into the layer.
            raise _InexactError(f"its units pass through {node.grad_fn.name()}, which may mix channels")

    def _refuse_what_does_not_vanish(self) -> None:
        """Zero half of the units of every group; what is then read of these units must be exactly zero."""
        masked = {layer: _random_half(group) for layer, group in self.groups.items()}
        for layer, group in self.groups.items():
            for name in group.outputs:
                mask_(self.net, name, sorted(masked[layer]))
        alive = self._nonzero_inputs()
        for layer, group in list(self.groups.items()):
            for reader, pairs in group.inputs.items():
                if any(alive[reader][index] for unit, index in pairs if unit in masked[layer]):
                    self.groups.pop(layer, None)
                    self.reasons[layer] = (
                        f"its units do not vanish with their weights: {reader} still reads other values than 0 "
                        "from them (an activation with act(0) != 0 on the way, or a constant added)"
                    )

    def _nonzero_inputs(self) -> dict[str, list[bool]]:
        """For every layer and each of its inputs: was anything but zero read?"""
        alive: dict[str, list[bool]] = {}

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            images = args[0].movedim(1 if isinstance(module, nn.Conv2d) else -1, 0)
            alive[self.names[module]] = (images.flatten(1) != 0).any(dim=1).tolist()

        for module in self.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_pre_hook(note)
        with torch.no_grad():
            self.net(self.images)
        return alive


def _random_half(group: UnitGroup) -> set[int]:
    """Random, since a wrong offset in a trace is even as a rule; the same for all layers that share the units."""
    draw = Random(min(group.outputs))
    return {0} | {unit for unit in range(1, group.num) if draw.random() < 0.5}


def _pools_channels(grad_fn: Any) -> bool:
    """Whether a mean or sum runs over other dimensions than the pixels' two."""
    if not grad_fn.name().startswith(("Mean", "Sum")):
        return False
    dims, num_dims = getattr(grad_fn, "_saved_dim", (0,)), len(grad_fn._saved_self_sym_sizes)
    return any((dim - 2**64 if dim >= 2**63 else dim) % num_dims < 2 for dim in dims)  # -1 is kept as 2^64 - 1


@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
