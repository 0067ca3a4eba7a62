"""The largest eigenvalues of the Hessian, by Lanczos' method on products of the Hessian with vectors.

Products: Pearlmutter 1994, Fast exact multiplication by the Hessian; the gradient of ``g(x) . v`` is ``H v``. Method:
Lanczos 1950; Golub & Van Loan, Matrix Computations, sec. 10.1 and 10.3 (full reorthogonalisation). For nets: Ghorbani
et al. 2019 (arXiv:1901.10159, sec. 2). Sagun et al. 2017 (arXiv:1706.04454) look at the same eigenvalues.

*Largest* means the algebraically largest, not the largest in size: of ``{-9, 1, 3}`` it is 3. It is the curvature of
the sharpest upward direction. Lanczos' method finds both ends of the spectrum, so that a large negative eigenvalue does
not hide it, as it would in a power iteration.

The result is approximate: the largest Ritz value, which is at most the eigenvalue (but for rounding) and grows to it
with the iterations. It is finished when the residual ``||H v - theta v||`` is at most ``tolerance * |theta|``; then an
eigenvalue lies within the residual of theta. The rounding of float32 leaves relative errors of about 1e-5.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from project.metrics.probes.vectors import Objective, check_parameters, check_scalar, flat


def top_eigenvalue(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    iterations: int = 20,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """The algebraically largest eigenvalue of the Hessian of the loss: :func:`top_eigenvalues` with a count of 1.

    Args:
        objective: function without arguments that gives the scalar loss at the current parameters.
        parameters: parameters that the Hessian is of, all of one type and on one device.
        iterations: largest number of products with the Hessian, 1 or more.
        tolerance: relative residual at which the iteration ends, 0 or more.
        seed: seed of the start vector; any int.
    """
    return top_eigenvalues(objective, parameters, 1, iterations, tolerance, seed)[0]


def top_eigenvalues(
    objective: Objective,
    parameters: Sequence[nn.Parameter],
    count: int,
    iterations: int = 20,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> list[float]:
    """The ``count`` algebraically largest eigenvalues of the Hessian of the loss, in falling order.

    It costs one forward pass, one backward pass that keeps its graph, and one further backward pass for each iteration,
    which takes about twice as long as a plain one. The memory holds ``iterations`` + 1 vectors of the parameters' size.
    Nothing is moved. The global random state is not used.

    Eigenvalues that are equal or very close may need more iterations, or count as one.

    Args:
        objective: function without arguments that gives the scalar loss at the current parameters, from operators that
            torch can differentiate twice.
        parameters: parameters that the Hessian is of, all of one type and on one device.
        count: number of eigenvalues, from 1 to the number of values in the parameters.
        iterations: largest number of products with the Hessian, at least 1 and at least ``count``.
        tolerance: relative residual at which the iteration ends, 0 or more.
        seed: seed of the start vector; any int.

    Raises:
        ValueError: if a number is outside its range.
        RuntimeError: torch's, if it cannot differentiate an operator of the loss twice.
    """
    parameters = check_parameters(parameters)
    size = sum(parameter.numel() for parameter in parameters)
    if not 1 <= count <= size:
        raise ValueError(f"count is {count}, but a Hessian of {size} parameters has 1 to {size} eigenvalues.")
    if iterations < count:
        raise ValueError(f"iterations is {iterations}, too few for {count} eigenvalues: choose about 20 or more.")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, but it bounds a residual: choose 0 or more, such as 1e-4.")
    # Fused attention has no second derivative, the plain matrix products have.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = check_scalar(objective())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        gradient = flat(gradients)

        def product(vector: Tensor) -> Tensor:
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(vector)
            found = torch.autograd.grad(
                gradient, parameters, vector, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return flat(found).detach()

        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(size, generator=generator, dtype=torch.float64).to(gradient)
        values = _lanczos(product, start.detach(), count, min(iterations, size), tolerance, generator)
    return values


def _lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    iterations: int,
    tolerance: float,
    generator: torch.Generator,
) -> list[float]:
    """The largest Ritz values after at most ``iterations`` products.

    ``H Q = Q T + beta q e^T`` with orthonormal columns Q ``[n, m]`` and a tridiagonal matrix T ``[m, m]``. An eigenpair
    (theta, s) of T gives the Ritz value theta, with the residual ``beta |s_m|``.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    epsilon = torch.finfo(start.dtype).eps
    while True:
        image = product(basis[-1])
        diagonal.append(torch.dot(image, basis[-1]).item())
        image = _orthogonal(image, basis)
        beta = image.norm().item()
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        if not matrix.isfinite().all():
            return [torch.nan] * count
        values, vectors = torch.linalg.eigh(matrix)
        top = values.flip(0)[:count]
        residuals = beta * vectors[-1].abs().flip(0)[:count]
        is_done = len(top) == count and bool((residuals <= tolerance * top.abs()).all())
        is_closed = beta <= 10 * epsilon * values.abs().max().item()  # the basis spans a space that H maps to itself
        if len(diagonal) == iterations or (is_closed and count == 1) or (is_done and not is_closed):
            return top.tolist()
        if is_closed:  # go on in the rest of the space, where equal eigenvalues may have further vectors
            other = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)
            image, beta = _orthogonal(other, basis), 0.0
        length = image.norm()
        beside.append(beta)
        basis.append(image / length)


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """The part of a vector that is orthogonal to all others; twice, because once leaves rounding errors."""
    for _ in range(2):
        for other in basis:
            vector = vector - torch.dot(vector, other) * other
    return vector
