"""The layers that the kernels act on, and a run of one of them, with a kernel and with torch's operators."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from project.compression.winograd.convolution import WinogradConv2d
from project.models.kernels.build import library
from project.models.layers import ConvNormAct, MaxPool

PARTS = {
    "batch norm": ("conv", "norm", "act"),
    "batch norm + pool": ("conv", "norm", "act", "pool"),
    "max pool": ("pool",),
    "first layer": ("conv", "norm", "act"),
    "first layer + pool": ("conv", "norm", "act", "pool"),
    "winograd": ("conv",),
}
"""By kernel, the parts of its layer."""

Call = Callable[[nn.Module, Tensor], list[Tensor]]
"""How the layer is called: the tensors that come of it."""


def make(kernel: str) -> tuple[nn.Module, Tensor]:
    """A layer that the kernel acts on, and its input."""
    torch.manual_seed(0)
    last = torch.channels_last
    if kernel == "max pool":
        return MaxPool(3, 2, 1), torch.randn(4, 16, 7, 7).contiguous(memory_format=last).requires_grad_()
    if kernel == "winograd":
        layer = WinogradConv2d.of(nn.Conv2d(8, 24, 3, padding=1), 2).eval()
        return layer.to(memory_format=last), torch.randn(2, 8, 9, 6).contiguous(memory_format=last)
    first, pooled = kernel.startswith("first"), kernel.endswith("pool")
    pool = (lambda: MaxPool(2, ceil_mode=True)) if pooled else None
    layer = ConvNormAct(1 if first else 8, 16, 3, activation=nn.ReLU, pool=pool).to(memory_format=last)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    x = torch.randn(6, 1 if first else 8, 7, 9).contiguous(memory_format=last)
    return layer, x if first else x.requires_grad_()


def part(net: nn.Module, name: str) -> Any:
    """A part of the layer by name; a layer of one part is that part."""
    return getattr(net, name, net)


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of a step of training; of a convolution that is not trained, the output alone."""
    if isinstance(net, WinogradConv2d):
        with torch.no_grad():
            return [net(x)]
    y = net(x)
    parameters = [p for p in [x, *net.parameters()] if p.requires_grad]
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), parameters)] if parameters else [y]


MakeCase = Callable[[], tuple[nn.Module, Tensor]]


@dataclass
class Outcome:
    """What a run gave: tensors or the class of an error, buffers of the layer, how often hooks were called."""

    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    error: str = ""


MODULES = [
    sys.modules[f"project.models.kernels.{name}"]
    for name in ("maps", "batch_norm", "first_layer", "max_pool", "winograd")
]
FUNCTIONS = ("batch_norm_relu", "batch_norm_relu_pool", "first_layer", "max_pool", "winograd")


def run(make_case: MakeCase, call: Call, calls: list[str]) -> Outcome:
    outcome, (net, x) = Outcome(), make_case()
    calls.clear()
    try:
        outcome.tensors = [y.detach() for y in call(net, x)]
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        outcome.error = type(error).__name__
    outcome.buffers, outcome.calls = list(net.buffers()), list(calls)
    return outcome


def watch(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C functions that are called from now on."""
    called: list[str] = []

    def noted(name: str, function: Callable[..., int]) -> Callable[..., int]:
        return lambda *args: called.append(name) or function(*args)

    for dtype in (torch.float32, torch.bfloat16):
        kernels = library(dtype)
        for name in FUNCTIONS:
            if hasattr(kernels, name):
                patch.setattr(kernels, name, noted(name, getattr(kernels, name)))
    return called


def compare(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, call: Call = gradients, calls: list[str] | None = None
) -> list[str]:
    """Assert that a layer gives the same with and without kernels, and return the names of the kernels that ran.

    Args:
        make_case: makes a layer and its input, the same at each call.
        call: what is done with them.
        calls: list to which hooks add their calls.
    """
    calls = [] if calls is None else calls
    with monkeypatch.context() as patch:
        used = watch(patch)
        ours = run(make_case, call, calls)
    with monkeypatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "library", lambda dtype: None)
        torchs = run(make_case, call, calls)
    assert (ours.error, ours.calls) == (torchs.error, torchs.calls)
    for name in ("tensors", "buffers"):
        pairs = zip(getattr(ours, name), getattr(torchs, name), strict=True)
        for number, (one, other) in enumerate(pairs):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{name} {number}"
            if not one.is_meta:
                one, other = (part.to_dense() if part.layout is not torch.strided else part for part in (one, other))
                check_close(one.double(), other.double(), f"{name} {number}", torchs.tensors)
    return used


def check_close(one: Tensor, other: Tensor, name: str, outputs: list[Tensor]) -> None:
    """Equal up to the rounding of the output's type, in the norm. A gradient may be all rounding: of the length of a
    weight before batch norm.
    """
    rough = any(output.dtype in (torch.bfloat16, torch.float16) for output in outputs)
    assert torch.equal(one.isnan(), other.isnan()), name
    difference = float((one - other).nan_to_num().norm() / other.nan_to_num().norm().clamp(min=0.5))
    assert difference < (0.1 if rough else 1e-4), f"{name}: {difference:.1e}"
