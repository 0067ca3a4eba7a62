"""Which module is running, and which functions it calls that compute over channels."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MIXING = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "local_response_norm")
"""Functions of ``torch.nn.functional`` that may compute statistics over channels, by name."""

REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "norm")
"""Functions and methods of tensors that may compute a number over channels, by name."""


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
    def names(self) -> tuple[str, ...]:
        """The names of all running modules, the net first."""
        return tuple(self._names)

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
