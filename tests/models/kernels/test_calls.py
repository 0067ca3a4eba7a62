"""Every kernel against torch's operators, whatever way a layer is called: in modes, transforms, second derivatives."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from helpers.kernel_layers import PARTS, Call, compare, gradients, make
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),  # torch's forward derivatives
]

CALLS: list[str] = []


class Operators(TorchDispatchMode):
    """Notes how often the operators that the kernels stand in for are called."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].replace("winograd", "convolution")  # an operator of torch's dispatcher
        if name in ("native_batch_norm", "relu", "convolution", "max_pool2d_with_indices"):
            CALLS.append(name)
        return func(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    """Doubles what ReLU gives."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **kwargs or {})
        return 2 * y if func is nn.functional.relu else y


def within(manager: Callable[[], AbstractContextManager[Any]]) -> Call:
    def call(net: nn.Module, x: Tensor) -> list[Tensor]:
        with manager():
            return gradients(net, x)

    return call


def backward_within(manager: Callable[[], AbstractContextManager[Any]]) -> Call:
    def call(net: nn.Module, x: Tensor) -> list[Tensor]:
        y = net(x)
        with manager():
            return list(torch.autograd.grad(y.sum(), [p for p in [x, *net.parameters()] if p.requires_grad]))

    return call


def saved_as(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor] = lambda x: x) -> Call:
    return within(lambda: torch.autograd.graph.saved_tensors_hooks(pack, unpack))


def without_denormals(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Saved tensors go through arithmetic that takes the smallest numbers for 0."""
    torch.set_flush_denormal(True)
    try:
        half, twice = (lambda x, by=by: by * x if x.is_floating_point() else x for by in (0.5, 2.0))
        return saved_as(half, twice)(net, x)
    finally:
        torch.set_flush_denormal(False)


def second_derivative(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a penalty on the gradient."""
    wanted = [p for p in [x, *net.parameters()] if p.requires_grad]
    y = net(x)
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    penalty = sum(grad.square().sum() for grad in first)
    second = torch.autograd.grad(penalty, wanted, allow_unused=True)
    return [y, *first, *(grad for grad in second if grad is not None)]


def batched_gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Rows of a Jacobian, which torch maps over."""
    y = net(x)
    grads = torch.linspace(-1, 1, 3 * y.numel()).view(3, *y.shape)
    wanted = [p for p in [x, *net.parameters()] if p.requires_grad]
    return list(torch.autograd.grad(y, wanted, grads, is_grads_batched=True))


def functional_gradient(net: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = dict(net.named_parameters()) or {"x": x}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        own = {name: value for name, value in parameters.items() if name != "x"}
        return torch.func.functional_call(net, own, (parameters.get("x", x),)).square().sum()

    return list(torch.func.grad(loss)(parameters, x.detach()).values())


def map_over(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [torch.func.vmap(net)(torch.stack([x, 2 * x]))]


def forward_derivative(net: nn.Module, x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level(), torch.no_grad():
        y = net(forward_ad.make_dual(x, torch.ones_like(x)))
        return list(filter(lambda part: part is not None, forward_ad.unpack_dual(y)))


def functional_parameters(net: nn.Module, x: Tensor) -> list[Tensor]:
    own = {name: (2 * value).detach().requires_grad_() for name, value in net.named_parameters()}
    y = torch.func.functional_call(net, own, (x,))
    return [y, *(torch.autograd.grad(y.sum(), list(own.values())) if own and y.requires_grad else ())]


WAYS: dict[str, Call] = {
    "training": gradients,
    "no gradients": within(torch.no_grad),
    "inference": lambda net, x: within(torch.inference_mode)(net, x.detach()),
    "autocast to bfloat16": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast to float16": within(lambda: torch.autocast("cpu", torch.float16)),
    "dispatch mode": within(Operators),
    "dispatch mode, backward": backward_within(TorchDispatchMode),
    "function mode": within(Functions),
    "default device": within(lambda: torch.device("meta")),
    "second derivative": second_derivative,
    "batched gradients": batched_gradients,
    "torch.func.grad": functional_gradient,
    "torch.func.vmap": map_over,
    "forward derivative": forward_derivative,
    "functional call": functional_parameters,
    "saved elsewhere": saved_as(lambda x: x.clone(memory_format=torch.contiguous_format)),
    "saved on the CPU": within(torch.autograd.graph.save_on_cpu),
    "saved without denormal numbers": without_denormals,
    "checkpoint": lambda net, x: gradients_of(lambda x: checkpoint(net, x, use_reentrant=False), net, x),
}


def gradients_of(function: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> list[Tensor]:
    y = function(x)
    wanted = [p for p in [x, *net.parameters()] if p.requires_grad]
    return [y, *(torch.autograd.grad(y.square().sum(), wanted) if y.requires_grad else ())]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel", PARTS)
def test_whatever_way_it_is_called(kernel: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(partial(make, kernel), monkeypatch, WAYS[way], CALLS)
