"""The table of rules, and what several rules use.

A rule says which channels of an operation's inputs and outputs go together. It is called with the
:class:`~project.compression.thinning.couplings.Couplings`, the result, and the arguments of the operation. It returns
the label of the result, or a list of labels for several results. A dimension that a rule leaves out of the label is not
followed any more: its slots must be fixed first. An operation without a rule fixes the channels that pass through it.
"""

from collections.abc import Callable, Sequence

from torch import nn

from project.compression.thinning.couplings import Couplings, Rule
from project.compression.thinning.slots import Axis, Slots

RULES: dict[str, Rule] = {}
"""The rule of each operation, by the operation's name in its library. A name ending in ``_`` uses the rule without."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator that gives operations a rule.

    Args:
        names: names of operations, such as ``"convolution"``.
    """

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def same(c: Couplings, axes: Sequence[Axis]) -> Axis:
    """The one axis that several axes are. Channels that meet a tensor which is not followed stay.

    Args:
        c: couplings of the net.
        axes: axes of tensors at one dimension.
    """
    known = [axis for axis in axes if axis is not None]
    for axis in known[1:]:
        c.joined.join(known[0], axis)
    if known and len(known) < len(axes):
        c.joined.fix(known[0], f"it meets a tensor in {c.stack.name or 'the net'} that is not sliced with it")
        return None
    return known[0] if known else None


def equal_shares(c: Couplings, slots: Slots, groups: int) -> Slots:
    """Let each of several groups lose the channels at the same places; the slots of the first group.

    Args:
        c: couplings of the net.
        slots: slots of all groups, one group after the other.
        groups: number of groups, 1 or more.
    """
    grid = slots.reshape(groups, -1)
    for row in grid[1:]:
        c.joined.join(grid[0], row)
    return grid[0]


def in_attention(c: Couplings) -> bool:
    """Whether torch's layer of attention is running.

    Args:
        c: couplings of the net.
    """
    return isinstance(c.net.get_submodule(c.stack.name), nn.MultiheadAttention)
