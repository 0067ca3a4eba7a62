"""Every kernel against torch's operators, whatever is strange about a layer or its input: outputs, gradients, running
statistics and calls of hooks are the same, errors are of the same class.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers.kernel_layers import PARTS, compare, make, part
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients"),
]

CALLS: list[str] = []
FUNCTIONS = {
    "batch norm": "batch_norm_relu",
    "batch norm + pool": "batch_norm_relu_pool",
    "max pool": "max_pool",
    "first layer": "first_layer",
    "first layer + pool": "first_layer",
    "winograd": "winograd",
}
"""The C function of each kernel."""
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Change = Callable[[Any], object]


class Own(Tensor):
    """A subclass of a tensor that counts the operators that see it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("conv2d", "batch_norm", "relu", "max_pool2d"):
            CALLS.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def note(*args: Any) -> None:
    """A hook of any kind."""
    CALLS.append("hook")


def subclass(layer: nn.Module) -> None:
    """A class of its own, whose forward does something else."""
    parent = type(layer)
    layer.__class__ = type("Other", (parent,), {"forward": lambda self, x: 2 * parent.forward(self, x)})


def instance(layer: nn.Module) -> None:
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)  # type: ignore[method-assign]


def buffer(name: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    return lambda norm: setattr(norm, name, change(getattr(norm, name)))


def parameter(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda layer: setattr(layer, name, nn.Parameter(change(getattr(layer, name).detach())))


def gaps(x: Tensor) -> Tensor:
    """The same values, every second place in memory."""
    return x[..., None].repeat_interleave(2, dim=-1)[..., 0]


def negative(x: Tensor) -> Tensor:
    """The same values, of which memory holds the opposite: torch notes the sign in a bit of the tensor."""
    return torch._neg_view(-x)


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x])


ANY: dict[str, Change] = {
    "subclass": subclass,
    "forward of the instance": instance,
    "forward hook": lambda layer: layer.register_forward_hook(note),
    "forward hook with keywords": lambda layer: layer.register_forward_hook(note, with_kwargs=True),
    "forward hook, always called": lambda layer: layer.register_forward_hook(note, always_call=True),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(note),
    "full backward hook": lambda layer: layer.register_full_backward_hook(note),
    "full backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(note),
    "frozen": lambda layer: layer.requires_grad_(False),
    "evaluation": lambda layer: layer.eval(),
    **{f"parameters of {dtype}": partial(lambda layer, dtype: layer.to(dtype), dtype=dtype) for dtype in TYPES},
}
CONV: dict[str, Change] = {
    "parametrized": lambda conv: parametrize.register_parametrization(conv, "weight", Double()),
    "weight norm": parametrizations.weight_norm,
    "weight in channels-last": lambda conv: conv.to(memory_format=torch.channels_last),
    "weight with gaps": parameter("weight", gaps),
    "weight of another sign": parameter("weight", negative),
    "weight of a class": parameter("weight", lambda x: x.as_subclass(Own)),
    "more outputs": parameter("weight", longer),
    "fewer inputs": parameter("weight", lambda x: x[:, :-1]),
    "kernel 1x1": parameter("weight", lambda x: x[:, :, :1, :1]),
    "circular": lambda conv: setattr(conv, "padding_mode", "circular"),
    "stride": lambda conv: setattr(conv, "stride", (2, 2)),
    "dilation": lambda conv: setattr(conv, "dilation", (2, 2)),
    "padding in words": lambda conv: setattr(conv, "padding", "same"),
    "hidden weight": lambda conv: vars(conv).update(weight=2 * conv.weight.detach()),
    "other steps": lambda conv: setattr(conv, "_conv_forward", lambda x, *_: 2 * x),
}
NORM: dict[str, Change] = {
    "parametrized": lambda norm: parametrize.register_parametrization(norm, "weight", Double()),
    "torch's class": lambda norm: setattr(norm, "__class__", nn.BatchNorm2d),
    "frozen weight": lambda norm: norm.weight.requires_grad_(False),
    "frozen bias": lambda norm: norm.bias.requires_grad_(False),
    "shared parameter": lambda norm: setattr(norm, "bias", norm.weight),
    "no parameters": lambda norm: (norm.register_parameter("weight", None), norm.register_parameter("bias", None)),
    "no bias": lambda norm: norm.register_parameter("bias", None),
    "no statistics": lambda norm: norm.__init__(16, track_running_stats=False),
    "statistics not tracked any more": lambda norm: setattr(norm, "track_running_stats", False),
    "no counter": buffer("num_batches_tracked", lambda _: None),
    "no mean": buffer("running_mean", lambda _: None),
    "no momentum": lambda norm: setattr(norm, "momentum", None),
    "momentum 1": lambda norm: setattr(norm, "momentum", 1),
    "momentum in a tensor": lambda norm: setattr(norm, "momentum", torch.tensor(0.3)),
    "large eps": lambda norm: setattr(norm, "eps", 10.0),
    "weight with gaps": parameter("weight", gaps),
    "bias with gaps": parameter("bias", gaps),
    "mean with gaps": buffer("running_mean", gaps),
    "variance with gaps": buffer("running_var", gaps),
    "weight of another sign": parameter("weight", negative),
    "weight of a class": parameter("weight", lambda x: x.as_subclass(Own)),
    "mean of a class": buffer("running_mean", lambda x: x.as_subclass(Own)),
    "long weight": parameter("weight", longer),
    "short bias": parameter("bias", lambda x: x[:8]),
    "long mean": buffer("running_mean", longer),
    "short variance": buffer("running_var", lambda x: x[:8]),
    "hidden weight": lambda norm: vars(norm).update(weight=2 * norm.weight.detach()),
    "hidden mean": lambda norm: vars(norm).update(running_mean=norm.running_mean + 1),
    **{f"weight of {dtype}": parameter("weight", partial(Tensor.to, dtype=dtype)) for dtype in TYPES},
    **{f"mean of {dtype}": buffer("running_mean", partial(Tensor.to, dtype=dtype)) for dtype in TYPES},
    **{f"variance of {dtype}": buffer("running_var", partial(Tensor.to, dtype=dtype)) for dtype in TYPES},
}
ACT: dict[str, Change] = {
    "in place": lambda act: setattr(act, "inplace", True),
    "another": lambda act: setattr(act, "__class__", nn.SiLU),
}
POOL: dict[str, Change] = {
    "torch's class": lambda pool: setattr(pool, "__class__", nn.MaxPool2d),
    "indices": lambda pool: setattr(pool, "return_indices", True),
    "dilation": lambda pool: setattr(pool, "dilation", 2),
    "whole windows": lambda pool: setattr(pool, "ceil_mode", False),
    "a pair": lambda pool: setattr(pool, "kernel_size", (2, 3)),
    "no stride": lambda pool: setattr(pool, "stride", 0),
    "negative padding": lambda pool: setattr(pool, "padding", -1),
    "much padding": lambda pool: setattr(pool, "padding", 2),
    "no kernel": lambda pool: setattr(pool, "kernel_size", 0),
    "large": lambda pool: setattr(pool, "kernel_size", 40),
}
CHANGES = {"conv": CONV, "norm": NORM, "act": ACT, "pool": POOL}

INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "some channels": lambda x: torch.cat([x, x], 1)[:, len(x[0]) :],
    "some images": lambda x: torch.cat([x, x])[::2],
    "turned": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "gaps": gaps,
    "another sign": negative,
    "a class": lambda x: x.as_subclass(Own),
    "no images": lambda x: x[:0],
    "one pixel": lambda x: x[:1, :, :1, :1],
    "three dimensions": lambda x: x[0],
    "not a number": lambda x: x.where(x < 1.5, torch.nan),
    "too many channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last),
    "gradient": lambda x: x,
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta": lambda x: x.to("meta"),
}


def cases() -> Iterator[Any]:
    for kernel, parts in PARTS.items():
        for name in parts:
            for what, change in {**ANY, **CHANGES[name]}.items():
                if (kernel, what) == ("winograd", "other steps"):
                    continue  # the layer's own forward does not promise to call it
                yield pytest.param(kernel, name, change, id=f"{kernel}-{name}-{what}")


@pytest.mark.parametrize("kernel", PARTS)
def test_a_plain_layer_takes_the_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(partial(make, kernel), monkeypatch) == [FUNCTIONS[kernel]]


@pytest.mark.parametrize(("kernel", "name", "change"), cases())
def test_whatever_a_layer_is(kernel: str, name: str, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    def case() -> tuple[nn.Module, Tensor]:
        net, x = make(kernel)
        change(part(net, name))
        return net, x

    compare(case, monkeypatch, calls=CALLS)


@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("kernel", PARTS)
def test_whatever_the_input_is(kernel: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def case() -> tuple[nn.Module, Tensor]:
        net, x = make(kernel)
        return net, INPUTS[what](x.detach()).requires_grad_(what == "gradient")

    compare(case, monkeypatch, calls=CALLS)


@pytest.mark.parametrize("norm_dtype", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernel", PARTS)
def test_whatever_the_types_are(
    kernel: str, dtype: torch.dtype, norm_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def case() -> tuple[nn.Module, Tensor]:
        net, x = make(kernel)
        net.to(dtype)
        if "norm" in PARTS[kernel]:
            part(net, "norm").to(norm_dtype)
        return net, x.detach().to(dtype).requires_grad_(x.requires_grad)

    used = compare(case, monkeypatch)
    taken = TYPES[:1] if "first" in kernel or kernel == "winograd" else TYPES[:2]
    fits = dtype in taken and (norm_dtype == torch.float32 or "norm" not in PARTS[kernel])
    assert (FUNCTIONS[kernel] in used) == fits


GLOBAL_HOOKS = [
    torch_module.register_module_forward_hook,
    torch_module.register_module_forward_pre_hook,
    torch_module.register_module_full_backward_hook,
    torch_module.register_module_full_backward_pre_hook,
]


@pytest.mark.parametrize("register", GLOBAL_HOOKS, ids=lambda register: register.__name__)
@pytest.mark.parametrize("kernel", PARTS)
def test_hooks_of_all_modules(kernel: str, register: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    handle = register(note)
    try:
        compare(partial(make, kernel), monkeypatch, calls=CALLS)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d])
@pytest.mark.parametrize("kernel", sorted(set(PARTS) - {"winograd"}))
def test_a_forward_that_was_replaced_for_all(
    kernel: str, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda layer, x: 2 * before(layer, x))
    compare(partial(make, kernel), monkeypatch)
