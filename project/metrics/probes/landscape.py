"""The loss along the gradient: how much it varies, how well a gradient predicts the next one, and how smooth it is.

Santurkar et al. 2018, How does batch normalization help optimization? (arXiv:1805.11604, sec. 3.1 and fig. 4). At a
point of the training the parameters x move along the gradient ``g = g(x)``, and three things are measured:

- the loss ``f(x - eta g)`` for several step sizes eta (fig. 4 a, the variation of the loss);
- the change of the gradient ``||g(x - eta g) - g(x)||`` (fig. 4 b, gradient predictiveness; small is predictive);
- the greatest change of the gradient for the way gone, ``max over eta of ||g(x - eta g) - g(x)|| / (eta ||g(x)||)``
  (fig. 4 c, "effective" beta-smoothness). It is a lower bound of the Lipschitz constant of the gradient on this line.

Norms are L2, over all given parameters together. Step sizes are learning rates, as in the paper: the way is
``eta ||g||`` long. The paper measures with batch norm in training mode, on the batch of the step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.metrics.probes.vectors import Objective, check_parameters, loss_and_gradient, moved, set_


@dataclass(frozen=True, eq=False)
class Landscape:
    """What :func:`loss_landscape` measures.

    Example::

        >>> import torch
        >>> from project.metrics.probes import loss_landscape
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> found = loss_landscape(lambda: (x * x).sum(), [x], distances=[0.1, 0.5])
        >>> [round(value, 4) for value in found.losses.tolist()], round(found.smoothness, 4)
        ([3.2, 0.0], 2.0)

    Args:
        loss: loss at the start; any number.
        gradient_norm: norm of the gradient at the start, 0 or more.
        losses: losses ``[S]`` float64 after a step of each size.
        gradient_changes: norms ``[S]`` float64 of the gradient after the step minus the gradient at the start.
        smoothness: greatest ratio of ``gradient_changes`` to the length of the step, 0 or more; NaN if the gradient at
            the start is 0.
    """

    loss: float
    gradient_norm: float
    losses: Tensor
    gradient_changes: Tensor
    smoothness: float


def loss_landscape(objective: Objective, parameters: Sequence[nn.Parameter], distances: Sequence[float]) -> Landscape:
    """Measure the loss and its gradient at ``x - eta g`` for S step sizes eta.

    It costs S + 1 forward and S + 1 backward passes, and memory for three vectors of the parameters' size. The
    parameters end with the same bits, and ``.grad`` does not change. Other state that the objective changes (running
    statistics of batch norm, random numbers) is the caller's: see :func:`project.metrics.probes.unchanged`.

    Args:
        objective: function without arguments that gives the scalar loss at the current parameters. It must be
            deterministic: the same images, and dropout with the same mask.
        parameters: parameters that the gradient is taken of, all of one type and on one device.
        distances: S step sizes eta, each above 0, at least one.

    Raises:
        ValueError: if a distance is not above 0, if there is none, or if the loss is not one value with a gradient.
    """
    check_distances(distances)
    parameters = check_parameters(parameters)
    losses, changes = [], []
    with moved(parameters) as start:
        loss, gradient = loss_and_gradient(objective, parameters)
        for distance in distances:
            set_(parameters, start - distance * gradient)
            loss_there, gradient_there = loss_and_gradient(objective, parameters)
            losses.append(loss_there.double().cpu())
            changes.append(torch.linalg.vector_norm((gradient_there - gradient).cpu(), dtype=torch.float64))
    norm = torch.linalg.vector_norm(gradient.cpu(), dtype=torch.float64)
    ways = torch.tensor(list(distances), dtype=torch.float64) * norm
    smoothness = (torch.stack(changes) / ways).max().item() if norm > 0 else math.nan
    return Landscape(loss.item(), norm.item(), torch.stack(losses), torch.stack(changes), smoothness)


def check_distances(distances: Sequence[float]) -> None:
    """Refuse step sizes that are no steps.

    Raises:
        ValueError: if there is none, or if one is not a finite number above 0.
    """
    if not len(distances):
        raise ValueError("distances is empty: give at least one step size, such as the learning rate.")
    if bad := [distance for distance in distances if not 0 < distance < math.inf]:
        raise ValueError(f"distances has {bad[0]}, but a step size is above 0: give some around the learning rate.")
