"""The rank of a matrix that is a low-rank matrix plus noise, by empirical variational Bayes.

Nakajima, Sugiyama, Babacan & Tomioka 2013, Global analytic solution of fully-observed variational Bayesian matrix
factorization (JMLR 14): the model is ``V = B A^T + noise``. The columns of ``A`` and ``B`` have Gaussian priors, and
the variances of the priors are estimated too. Each component is then either kept or dropped.

Nakajima, Tomioka, Sugiyama & Babacan 2015 (JMLR 16, theorems 2 and 4) give the form that is used here, with one
threshold, and with a search over one number for the noise variance. ``V`` is ``L x M`` with ``L <= M``,
``alpha = L / M`` and singular values ``g``. A component stays if

    g^2 > M x_low sigma^2,    x_low = (1 + t)(1 + alpha / t),    phi(t) + phi(t / alpha) = 0,
    phi(z) = log(z + 1) / z - 1 / 2.

The noise variance ``sigma^2`` minimises the mean of ``psi(g^2 / (M sigma^2))``, which is the free energy up to
constants:

    psi(x) = x - log x + [x > x_low] (log(tau + 1) + alpha log(tau / alpha + 1) - tau),
    tau(x) = (x - (1 + alpha) + sqrt((x - (1 + alpha))^2 - 4 alpha)) / 2.
"""

import math

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
_POINTS = 1000
"""Number of candidates of the noise variance in a search.

There are two searches. The second one is between the neighbours of the first one's best candidate.
"""


def vbmf_rank(matrix: Tensor) -> int:
    """The number of components of a matrix that stay, 0 or more."""
    return vbmf(torch.linalg.svdvals(matrix.detach().double()).cpu().numpy(), *matrix.shape)[0]


def vbmf(singular_values: Array, num_rows: int, num_columns: int) -> tuple[int, float]:
    """The rank and the noise variance of a matrix.

    Args:
        singular_values: all ``min(num_rows, num_columns)`` singular values of the matrix, in any order.
        num_rows, num_columns: numbers of rows and columns of the matrix, 1 or more; they can be exchanged.
    """
    short, long = sorted((num_rows, num_columns))
    alpha = short / long
    squares = np.sort(np.asarray(singular_values, dtype=np.float64))[::-1] ** 2 / long
    if squares[0] == 0:
        return 0, 0.0
    bound = _threshold(alpha)
    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)  # more components than this are never kept
    low = max(squares[most] / bound, squares[most:].mean())  # theorem 4's bounds
    high = max(squares.mean(), low)
    low = max(low, high * 1e-14)  # without noise, the last singular values are only rounding errors
    for _ in range(2):
        candidates = np.geomspace(low, high, _POINTS)
        energies = _psi(squares[:, None] / candidates, alpha, bound).sum(axis=0)
        best = int(energies.argmin())
        low, high = candidates[max(best - 1, 0)], candidates[min(best + 1, _POINTS - 1)]
    variance = float(candidates[best])
    return int((squares > bound * variance).sum()), variance


def _threshold(alpha: float) -> float:
    """``x_low``, where ``t`` is found by bisection: the sum of the two ``phi`` falls from 1 to -1 as ``t`` grows."""
    low, high = 0.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        if sum(math.log1p(z) / z - 0.5 for z in (middle, middle / alpha)) > 0:
            low = middle
        else:
            high = middle
    return (1 + low) * (1 + alpha / low)


def _psi(x: Array, alpha: float, bound: float) -> Array:
    """The function ``psi`` of the module's docstring, for each entry of ``x``."""
    x = np.maximum(x, 1e-300)
    kept = np.maximum(x, bound)  # `bound` is above (1 + sqrt(alpha))^2, so that the root is real
    tau = (kept - (1 + alpha) + np.sqrt((kept - (1 + alpha)) ** 2 - 4 * alpha)) / 2
    return x - np.log(x) + (x > bound) * (np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau)
