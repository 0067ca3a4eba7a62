"""Sharpness of a minimum: how far the loss can rise in a small box around the parameters.

Keskar et al. 2017, On large-batch training for deep learning (arXiv:1609.04836, sec. 2.2.2, metric 2.1):

    sharpness = 100 * (max over z in C of f(x + A z) - f(x)) / (1 + f(x))
    C = {z: -epsilon (|(A^+ x)_i| + 1) <= z_i <= epsilon (|(A^+ x)_i| + 1)}

A is the identity (full space), or a random matrix ``[n, p]`` whose columns span a subspace (the paper takes p = 100);
``A^+`` is its pseudo-inverse. The columns here are Gaussian and have length 1. L-BFGS-B searches the maximum in 10
iterations, as in the paper.

The result is approximate: a lower bound of the true sharpness, because the search is local and short. For a quadratic
loss with a diagonal Hessian and no negative eigenvalue it is exact but for rounding. The loss of a net in float32 has a
relative error of about 1e-7, which is about 1e-5 of sharpness.

Two decisions of ours. At an exact minimum the gradient is 0 and a search from z = 0 would not move, so it starts at a
random point near the centre of the box, on the side of each coordinate that the gradient at x points to. And it runs in
coordinates in which the box is the cube [-1, 1]^p, with a loss that is scaled so that the first step reaches the sides
of the box. The best value of all points that were tried counts.

Sharpness is no property of the function that a net computes: nets with the same outputs can have any sharpness (Dinh et
al. 2017, arXiv:1703.04933). Compare it between nets of one kind.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from project.metrics.probes.vectors import Objective, check_parameters, loss_and_gradient, moved, set_

_START = 1e-2
"""Largest distance of the start from the centre, as a share of the box."""


def sharpness(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    epsilon: float = 1e-3,
    subspace: int | None = None,
    iterations: int = 10,
    seed: int = 0,
) -> float:
    """Keskar's metric 2.1, in percent: 0 if the loss does not rise in the box; NaN if the loss is not finite.

    It costs two forward and backward passes, and one to two more for each iteration. In the full space SciPy holds
    about 25 vectors of the parameters' size in float64; a subspace needs a matrix of n times p values. The parameters
    end with the same bits. The global random state is not used. Other state that the objective changes is the
    caller's: see :func:`project.metrics.probes.unchanged`.

    Args:
        objective: function without arguments that gives the scalar loss at the current parameters. It must be
            deterministic, and above -1.
        parameters: parameters that are moved, all of one type and on one device.
        epsilon: size of the box, above 0; the paper takes 1e-3 and 5e-4.
        subspace: number p of dimensions of a random subspace, from 1 to the number of parameters. ``None`` searches in
            the full space.
        iterations: number of iterations of L-BFGS-B, 1 or more.
        seed: seed of the start and of the subspace; any int.

    Raises:
        ValueError: if a number is outside its range.
    """
    from scipy.optimize import minimize

    parameters = check_parameters(parameters)
    size = sum(parameter.numel() for parameter in parameters)
    check_box(epsilon, subspace, iterations)
    if subspace is not None and subspace > size:
        raise ValueError(f"subspace is {subspace}, but there are {size} parameters: choose at most that many.")
    generator = torch.Generator().manual_seed(seed)
    with moved(parameters) as start:
        box = _Box(start, epsilon, subspace, generator)
        loss, gradient = loss_and_gradient(objective, parameters)
        if not math.isfinite(loss.item()):
            return math.nan
        at_start = loss.item()
        best = [at_start]

        def rise(z: Any) -> tuple[float, Any]:
            """``f(x + A z) - f(x)`` and its gradient in z ``[p]``."""
            set_(parameters, box.point(torch.from_numpy(z)))
            there, gradient = loss_and_gradient(objective, parameters)
            best.append(there.item())
            return there.item() - at_start, box.slopes(gradient).numpy()

        u = _START * (2 * torch.rand(box.size, generator=generator, dtype=torch.float64) - 1)
        slopes = box.slopes(gradient)
        u = torch.where(slopes == 0, u, u.abs() * slopes.sign())
        _, near = rise(u.numpy())
        scale = 1e-2 * abs(near).mean()
        if 0 < scale < math.inf:
            minimize(
                lambda z: tuple(-each / scale for each in rise(z)),
                u.numpy(),
                jac=True,
                method="L-BFGS-B",
                bounds=[(-1, 1)] * box.size,
                options={"maxiter": iterations, "maxfun": 2 * iterations},
            )
    top = max(value for value in best if math.isfinite(value))
    return 100 * (top - at_start) / (1 + at_start)


class _Box:
    """The box in coordinates u of [-1, 1]^p: ``z = bounds * u``."""

    def __init__(self, start: Tensor, epsilon: float, subspace: int | None, generator: torch.Generator) -> None:
        self.start, self.axes = start, None
        inside = start
        if subspace is not None:
            axes = torch.randn(len(start), subspace, generator=generator).to(start)
            self.axes = axes / axes.norm(dim=0)
            inside = torch.linalg.lstsq(self.axes.cpu().double(), start.cpu().double()[:, None]).solution[:, 0]
        self.bounds = epsilon * (inside.cpu().double().abs() + 1)
        self.size = len(self.bounds)

    def point(self, u: Tensor) -> Tensor:
        """The parameters ``[n]`` at u ``[p]`` float64."""
        z = (self.bounds * u).to(self.start)
        return self.start + (z if self.axes is None else self.axes @ z)

    def slopes(self, gradient: Tensor) -> Tensor:
        """The gradient in u ``[p]`` float64 that belongs to a gradient in the parameters ``[n]``."""
        along = gradient if self.axes is None else self.axes.T @ gradient
        return self.bounds * along.cpu().double()


def check_box(epsilon: float, subspace: int | None, iterations: int) -> None:
    """Refuse numbers that give no box or no search.

    Raises:
        ValueError: if a number is outside its range.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}, but it is the size of a box: choose a number above 0, such as 1e-3.")
    if subspace is not None and subspace < 1:
        raise ValueError(f"subspace is {subspace}, but it counts dimensions: choose 1 or more, or null for all.")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, but it counts steps of the search: choose 1 or more.")
