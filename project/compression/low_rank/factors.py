"""Low-rank factors of one weight: two or three thin layers that do nearly what a thick one does.

- ``svd``: Denton et al. 2014 (arXiv:1404.0736, sec. 3.2) for linear layers and 1x1 convolutions; of a k x k convolution
  Zhang et al. 2015 (arXiv:1505.06798, sec. 3.1): k x k to ``rank`` channels, then 1x1.
- ``spatial``: Jaderberg et al. 2014 (arXiv:1405.3866, sec. 2.2, scheme 2): k x 1 to ``rank`` channels, then 1 x k. Its
  optimum is the SVD of the rearranged kernel (Tai et al. 2016, arXiv:1511.06067, theorem 1).
- ``tucker``: Kim et al. 2016 (arXiv:1511.06530, sec. 3.1): 1x1 to ``rank_in``, k x k to ``rank_out``, 1x1; by HOSVD,
  then HOOI (De Lathauwer et al. 2000).

The first two are one thing: a matrix ``A`` of the weight, whose rows are on the output's side, becomes ``U (U^T A)``
with an orthonormal ``U`` of ``rank`` columns. The ``U`` that keeps most of ``A`` holds the first eigenvectors of
``A A^T``. The one that keeps most of what the layer answers (Zhang et al., eq. 4) holds those of ``A C A^T``, with
``C`` the second moment of the inputs: that is the second moment of ``A``'s own responses, which is measured. For
``spatial`` this counts what the columns of pixels under a kernel answer as if they were not added up.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["svd", "spatial", "tucker"]
Ranks = tuple[int, ...]

_SWEEPS = 3
"""Of HOOI, which improves one factor after the other."""


def kernel_of(weight: Tensor) -> tuple[int, int]:
    """Height and width; of a linear layer 1, 1."""
    return (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else (1, 1)


def kinds_of(weight: Tensor) -> tuple[Kind, ...]:
    """What a weight can become: the factors differ only where the kernel has more than one row and column."""
    return ("svd", "spatial", "tucker") if min(kernel_of(weight)) > 1 else ("svd",)


def matrix_of(weight: Tensor, kind: Kind) -> Tensor:
    """``A``: ``[out, in * kh * kw]``, or for ``spatial`` ``[out * kw, in * kh]``; float64."""
    weight = _exact(weight)
    if kind == "spatial":
        return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    return weight.flatten(1)


def largest_ranks(weight: Tensor, kind: Kind) -> Ranks:
    """The ranks that lose nothing."""
    if kind == "tucker":
        out_channels, in_channels, *kernel = weight.shape
        area = math.prod(kernel)
        return min(in_channels, out_channels * area), min(out_channels, in_channels * area)
    return (min(matrix_of(weight, kind).shape),)


def factors_of(weight: Tensor, kind: Kind, ranks: Ranks, moment: Tensor | None = None) -> list[Tensor]:
    """Weights of the thin layers, in their order, of the weight's type, device and number of dimensions.

    Args:
        weight: ``[out, in]`` or ``[out, in, kh, kw]``.
        kind, ranks: ``(rank,)``, of ``tucker`` ``(rank_in, rank_out)``.
        moment: second moment of the responses of :func:`matrix_of` ``[rows, rows]``, to keep those; not of ``tucker``.
    """
    if kind == "tucker":
        return [factor.to(weight) for factor in _tucker(_exact(weight), *ranks)]
    matrix = matrix_of(weight, kind)
    basis = torch.linalg.eigh(matrix @ matrix.T if moment is None else moment).eigenvectors.flip(1)[:, : ranks[0]]
    inner = basis.T @ matrix
    scale = inner.norm(dim=1).clamp(min=1e-30).sqrt()  # both get the same share: neither learns faster
    basis, inner = basis * scale, inner / scale[:, None]
    if weight.dim() == 2:
        return [inner.to(weight), basis.to(weight)]
    out_channels, in_channels, height, width = weight.shape
    if kind == "spatial":
        first = inner.view(-1, in_channels, height, 1)
        second = basis.view(out_channels, width, -1).transpose(1, 2).unsqueeze(2)
    else:
        first, second = inner.view(-1, in_channels, height, width), basis[:, :, None, None]
    return [first.to(weight), second.to(weight)]


def product_of(factors: list[Tensor]) -> Tensor:
    """The one weight that does what the thin layers do one after the other."""
    if len(factors) == 3:
        first, core, last = factors
        return torch.einsum("oa,abyx,bi->oiyx", last[:, :, 0, 0], core, first[:, :, 0, 0])
    first, second = factors
    if first.dim() == 2:
        return second @ first
    return torch.einsum("oryx,rizw->oizx" if second.shape[3] > 1 else "oryx,rizw->oizw", second, first)


def errors_of(weight: Tensor, kind: Kind, moment: Tensor | None = None) -> Tensor:
    """Share of the squares that each rank loses, of the weight or, with ``moment``, of the responses.

    Returns:
        ``[largest + 1]`` for ranks from 0; of ``tucker`` ``[largest_in + 1, largest_out + 1]``, before HOOI.
    """
    if kind == "tucker":
        core = _project(_exact(weight), *_hosvd(_exact(weight), *largest_ranks(weight, kind)))
        energy = core.square().sum(dim=(2, 3)).T
        kept = torch.zeros(energy.shape[0] + 1, energy.shape[1] + 1, dtype=torch.float64)
        kept[1:, 1:] = energy.cumsum(0).cumsum(1)
        return 1 - kept / energy.sum().clamp(min=1e-300)
    matrix = matrix_of(weight, kind)
    energy = torch.linalg.eigvalsh(matrix @ matrix.T if moment is None else moment).flip(0).clamp(min=0)
    kept = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    return (1 - kept / energy.sum().clamp(min=1e-300))[: min(matrix.shape) + 1]


def _exact(weight: Tensor) -> Tensor:
    """On the processor; a weight without values, of a net that is built to be loaded, stays without."""
    return weight.detach().to("meta" if weight.is_meta else "cpu", torch.float64)


def _tucker(weight: Tensor, rank_in: int, rank_out: int) -> list[Tensor]:
    """HOSVD, then each basis anew for what the other one leaves."""
    basis_in, basis_out = _hosvd(weight, rank_in, rank_out)
    for _ in range(_SWEEPS):
        basis_out = _basis(torch.einsum("oiyx,ib->obyx", weight, basis_in).flatten(1), rank_out)
        basis_in = _basis(torch.einsum("oiyx,oa->iayx", weight, basis_out).flatten(1), rank_in)
    core = _project(weight, basis_in, basis_out)
    return [basis_in.T[:, :, None, None], core, basis_out[:, :, None, None]]


def _hosvd(weight: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor]:
    return _basis(weight.transpose(0, 1).flatten(1), rank_in), _basis(weight.flatten(1), rank_out)


def _basis(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]


def _project(weight: Tensor, basis_in: Tensor, basis_out: Tensor) -> Tensor:
    return torch.einsum("oiyx,ib,oa->abyx", weight, basis_in, basis_out)
