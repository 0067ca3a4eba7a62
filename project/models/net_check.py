"""Checks, before the first step, whether a net and the data fit together. An error says the fault in one sentence."""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from project.models.signature import find, parameters, takes_any

_NAMES = {
    "num_classes": (
        re.compile(r"(num|n)_?(classes|class|outputs|labels)|classes|out_(features|channels)"),
        "num_classes",
    ),
    "num_channels": (re.compile(r"(in|input|num|n)_?(chans?|channels|planes)|channels"), "in_chans"),
    "height": (re.compile(r"(img|image|input)_?(size|resolution)|resolution"), "img_size"),
}
"""For each value of the data: a pattern of the names that nets give this argument, and its name in timm.

timm's functions take ``**kwargs``, so their signatures do not show the name.
"""


def channels_last_(net: nn.Module) -> nn.Module:
    """Store the 4-d parameters and buffers of a net channels-last, in place; ``net.to`` refuses a net with 5-d ones."""
    return net._apply(lambda each: each.to(memory_format=torch.channels_last) if each.dim() == 4 else each)


def build_lazy_(net: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Run the net once if it has lazy layers, which get their shapes from the first images.

    Raises:
        ValueError: if the net cannot take such images.
    """
    if any(map(is_lazy, [*net.parameters(), *net.buffers()])):
        try:
            _run(net, torch.zeros(2, *image_shape))
        except Exception as error:
            raise ValueError(_refusal(net, image_shape, None, error)) from error


def check_net(
    net: nn.Module, image_shape: tuple[int, int, int], num_classes: int, described: Mapping[str, Any] | None = None
) -> None:
    """Run two black images through the net, in eval and in train mode. Weights, buffers, modes and random state stay.

    Args:
        net: network that maps images ``[N, C, H, W]`` to logits ``[N, K]``.
        image_shape: shape (C, H, W) of the data's images.
        num_classes: number K of the data's classes, at least 1.
        described: ``class_path`` and arguments of the net, for the hint in the error. ``None`` gives no hint.

    Raises:
        ValueError: if the net cannot take the images, or if it does not give one tensor ``[N, K]`` with this K.
    """
    parameter = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    images = torch.zeros(2, *image_shape, device=parameter.device, dtype=parameter.dtype)
    auxiliary = any(getattr(module, "aux_logits", False) for module in net.modules())
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        try:
            outputs = [_run(net, images)]
        except Exception as error:
            raise ValueError(_refusal(net, image_shape, described, error)) from error
        try:
            outputs.append(_run_in_training(net, images))
        except Exception as error:  # some layers can train on one kind of device only
            if auxiliary:
                raise ValueError(
                    f"model.net is {_name(net, described)}, and its auxiliary heads cannot take the data's images "
                    f"{'x'.join(map(str, image_shape))}: choose `init_args: {{aux_logits: false}}`."
                ) from error
    for mode, output in zip(("", "in training "), outputs, strict=False):
        if problem := _problem(output, mode, num_classes, described, auxiliary):
            raise ValueError(f"model.net is {_name(net, described)}, and {problem}")


def check_loss(loss: nn.Module, num_classes: int, mixed: bool) -> None:
    """Try a copy of the loss on the logits and targets of two images.

    Args:
        loss: module that maps logits ``[N, K]`` and targets to a scalar.
        num_classes: number K of classes, at least 1.
        mixed: whether targets are distributions ``[N, K]`` instead of class numbers ``[N]``.

    Raises:
        ValueError: if the loss cannot take them, or if it gives no scalar.
    """
    tensor = next((t for t in (*loss.parameters(), *loss.buffers()) if t.is_floating_point()), torch.empty(0))
    logits = torch.zeros(2, num_classes, device=tensor.device)
    targets = logits.softmax(dim=1) if mixed else torch.zeros(2, dtype=torch.int64, device=tensor.device)
    name, given = type(loss).__name__, f"logits [N, {num_classes}] and {'mixed targets' if mixed else 'class numbers'}"
    wanted = f"choose one that gives a scalar for {given} {list(targets.shape)}".replace("[2", "[N")
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            value = copy.deepcopy(loss)(logits, targets)
    except Exception as error:
        raise ValueError(
            f"model.loss is {name}, and it cannot take {given} ({_first_line(error)}): {wanted}."
        ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"model.loss is {name}, and it gives {shape}, not a scalar: {wanted}.")


def check_on_net(argument: str, module: nn.Module, net: nn.Module) -> None:
    """Try a copy of a penalty or of a constraint on a copy of the net.

    Args:
        argument: name of the classifier's argument, ``penalties`` or ``max_norm``.
        module: penalty or constraint to try, a module of one argument.
        net: net that the module is called with.

    Raises:
        ValueError: if the module cannot take the net, or if penalties give anything but a scalar or ``None``.
    """
    name = f"model.{argument} is {type(module).__name__}, and it"
    result = "returns a scalar tensor or None" if argument == "penalties" else "changes its weights in place"
    wanted = f"choose a module whose forward takes the net alone and {result}."
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            value = copy.deepcopy(module)(copy.deepcopy(net))
    except Exception as error:
        raise ValueError(f"{name} cannot be called with the net ({_first_line(error)}): {wanted}") from error
    if argument == "penalties" and value is not None and not (isinstance(value, Tensor) and value.dim() == 0):
        shape = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{name} gives {shape}, not a scalar: {wanted}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")[:200]


def _problem(
    output: object, mode: str, num_classes: int, described: Mapping[str, Any] | None, auxiliary: bool
) -> str | None:
    if not isinstance(output, Tensor):
        mend = "`init_args: {aux_logits: false}`" if auxiliary else "a net that returns them"
        kind = type(output).__name__
        return f"{mode}it gives a {kind}, but logits [N, {num_classes}] alone are needed: choose {mend}."
    if output.dim() != 2 or len(output) != 2:
        shape = ", ".join(["N", *map(str, output.shape[1:])]) if len(output) == 2 else str(list(output.shape))[1:-1]
        return f"it gives [{shape}], but logits [N, {num_classes}] are needed: end it with flatten and a linear layer."
    if output.shape[1] != num_classes:
        mend = _hint("num_classes", described) or f"give it a last layer of {num_classes} outputs"
        return f"it gives {output.shape[1]} logits, but the data have {num_classes} classes: {mend}."
    return None


def _refusal(
    net: nn.Module, image_shape: tuple[int, int, int], described: Mapping[str, Any] | None, error: Exception
) -> str:
    shape, name = "x".join(map(str, image_shape)), _name(net, described)
    wanted = next((layer.in_channels for layer in net.modules() if type(layer) is nn.Conv2d), None)
    if wanted is not None and wanted != image_shape[0] and "channels" in str(error):
        mend = _hint("num_channels", described) or f"choose data of {wanted} channels, or another net"
        return (
            f"model.net is {name}, and its first convolution takes {wanted} channels, but the data's images {shape} "
            f"have {image_shape[0]}: {mend}."
        )
    mend = _hint("height", described) or "choose data whose images it takes, or another net"
    return f"model.net is {name}, and it cannot take the data's images {shape} ({_first_line(error)}): {mend}."


def _hint(value: str, described: Mapping[str, Any] | None) -> str | None:
    """The line of YAML that gives a value of the data to the net; ``None`` if no argument of the net seems to fit."""
    pattern, usual = _NAMES[value]
    name = next(filter(pattern.fullmatch, _arguments(described)), None)
    if name is None and described and takes_any(find(described["class_path"])):
        name = usual
    return name and f"add `net_arguments: {{{name}: {value}}}` to the configuration"


def _arguments(described: Mapping[str, Any] | None) -> list[str]:
    return list(parameters(find(described["class_path"]))) if described else []


def _name(net: nn.Module, described: Mapping[str, Any] | None) -> str:
    return str(described["class_path"]) if described else type(net).__name__


def _run(net: nn.Module, images: Tensor) -> object:
    with _mode(net, training=False), torch.no_grad():
        return net(images)


def _run_in_training(net: nn.Module, images: Tensor) -> object:
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        with _mode(net, training=True), torch.no_grad():
            return net(images)
    finally:
        for name, buffer in net.named_buffers():
            buffer.copy_(before[name])


@contextmanager
def _mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the net into train or eval mode. Afterwards every module has its own former mode again."""
    modes = {module: module.training for module in net.modules()}
    net.train(training)
    try:
        yield
    finally:
        for module, before in modes.items():
            module.training = before
