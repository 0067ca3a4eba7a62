"""The loss on the straight line between two checkpoints.

Goodfellow et al. 2015, Qualitatively characterizing neural network optimization problems (arXiv:1412.6544, sec. 2);
Keskar et al. 2017 (arXiv:1609.04836, sec. 2.2.1 and fig. 3) draw the line from a small-batch to a large-batch solution,
with fractions from -1 to 2. The point at the fraction a is ``(1 - a) start + a end``.

All tensors of floating-point numbers are interpolated: parameters, and buffers such as the running mean and variance of
batch norm. So a fraction of 0 or 1 is exactly the checkpoint, with the statistics that it was saved with. Between them
the interpolated statistics are not those that the interpolated weights have; a barrier between two nets may be due to
them alone (Jordan et al. 2023, arXiv:2211.08403, sec. 3). To see it, measure a second time with the statistics of the
batch: ``loss_and_accuracy(…, batch_statistics=True)``. A variance that is extrapolated below 0 becomes 0.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from project.metrics.probes.unchanged import unchanged

Result = TypeVar("Result")
State = Mapping[str, Tensor]


def interpolate(
    objective_of: Callable[[dict[str, Tensor]], Result],
    start: State,
    end: State,
    fractions: Sequence[float],
) -> list[Result]:
    """Measure at each fraction of the line from one state dict to another: one call of ``objective_of`` for each.

    Args:
        objective_of: function that takes a state dict and measures a net with it, such as
            :func:`loss_and_accuracy` gives.
        start: state dict at the fraction 0, of the same net as ``end``.
        end: state dict at the fraction 1.
        fractions: places on the line; 0 is the start, 1 the end. Numbers below 0 and above 1 extrapolate.

    Raises:
        ValueError: if the state dicts belong to different nets.
    """
    if differing := sorted(start.keys() ^ end.keys()):
        raise ValueError(f"start and end are of different nets: only one of them has {differing[0]}.")
    for name, tensor in start.items():
        if tensor.shape != end[name].shape:
            shapes = f"{list(tensor.shape)} and {list(end[name].shape)}"
            raise ValueError(f"start and end are of different nets: {name} has the shapes {shapes}.")
    return [objective_of(state_between(start, end, fraction)) for fraction in fractions]


def state_between(start: State, end: State, fraction: float) -> dict[str, Tensor]:
    """The state dict at one place of the line. Whole numbers, such as counts of batches, come from the nearer end.

    Args:
        start: state dict at the fraction 0.
        end: state dict at the fraction 1.
        fraction: place on the line; any number.
    """
    state = {}
    for name, tensor in start.items():
        other = end[name].to(tensor.device)
        if tensor.is_floating_point():
            between = torch.lerp(tensor, other.to(tensor.dtype), fraction)  # exact at 0 and 1
            state[name] = between.clamp(min=0) if name.endswith("running_var") else between
        else:
            state[name] = (tensor if fraction < 0.5 else other).clone()
    return state


def loss_and_accuracy(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    batch_statistics: bool = False,
) -> Callable[[State], tuple[float, float]]:
    """A function for :func:`interpolate`: loss and accuracy of a net with given weights. It leaves the net unchanged.

    Each call costs one forward pass over all images at once.

    Args:
        net: net that the state dicts belong to. It runs in evaluation mode.
        images: images ``[N, C, H, W]`` as the net takes them, on its device.
        labels: class numbers ``[N]`` of the images.
        loss: function of logits ``[N, K]`` and labels that gives a scalar.
        batch_statistics: whether batch norms use mean and variance of these images instead of the running ones.
    """

    @torch.no_grad()
    def measure(state: State) -> tuple[float, float]:
        with unchanged(net):
            values = OrderedDict(state)
            values._metadata = net.state_dict()._metadata  # type: ignore[attr-defined]  # the versions of its modules
            net.load_state_dict(values)
            net.eval()
            for module in net.modules():
                if batch_statistics and isinstance(module, _NormBase):
                    module.train()
            logits = net(images)
            return loss(logits, labels).item(), (logits.argmax(dim=1) == labels).double().mean().item()

    return measure
