"""Low-rank factors of one weight: the weights of two or three thin layers that approximate one layer.

- ``svd``: for linear layers and 1x1 convolutions, Denton et al. 2014 (arXiv:1404.0736, sec. 3.2). For k x k
  convolutions, Zhang et al. 2015 (arXiv:1505.06798, sec. 3.1): k x k to ``rank`` channels, then 1x1.
- ``spatial``: Jaderberg et al. 2014 (arXiv:1405.3866, sec. 2.2, scheme 2): k x 1 to ``rank`` channels, then 1 x k. The
  SVD of the rearranged kernel is the optimum (Tai et al. 2016, arXiv:1511.06067, theorem 1).
- ``tucker``: Kim et al. 2016 (arXiv:1511.06530, sec. 3.1): 1x1 to ``rank_in`` channels, k x k to ``rank_out`` channels,
  then 1x1. It is computed by HOSVD, and improved by HOOI (De Lathauwer et al. 2000).

``svd`` and ``spatial`` share one formula. The weight is arranged as a matrix ``A`` whose rows belong to outputs. It
becomes the product ``U (U^T A)``, where ``U`` has ``rank`` orthonormal columns.

- To keep most of the weight, the columns of ``U`` are the first eigenvectors of ``A A^T``.
- To keep most of the layer's responses (Zhang et al., eq. 4), they are the first eigenvectors of ``A C A^T``, where
  ``C`` is the second moment of the inputs. ``A C A^T`` is the second moment of the responses of ``A``, and is measured.
  For ``spatial`` this is approximate: the layer adds up the responses of the columns of pixels under its kernel, and
  the second moment counts each of them on its own.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["svd", "spatial", "tucker"]
Ranks = tuple[int, ...]

_SWEEPS = 3
"""Number of passes of HOOI. Each pass improves one factor after the other."""


def kernel_of(weight: Tensor) -> tuple[int, int]:
    """Height and width of the kernel; 1 and 1 for a linear layer."""
    return (weight.shape[2], weight.shape[3]) if weight.dim() == 4 else (1, 1)


def kinds_of(weight: Tensor) -> tuple[Kind, ...]:
    """The kinds of factors that differ for this weight.

    If the kernel has one row or one column, as in a 1x1 convolution or a linear layer, ``svd`` is the only one.
    """
    return ("svd", "spatial", "tucker") if min(kernel_of(weight)) > 1 else ("svd",)


def matrix_of(weight: Tensor, kind: Kind) -> Tensor:
    """The matrix ``A`` in float64: ``[out, in * kh * kw]``, and for ``spatial`` ``[out * kw, in * kh]``."""
    weight = _exact(weight)
    if kind == "spatial":
        return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    return weight.flatten(1)


def largest_ranks(weight: Tensor, kind: Kind) -> Ranks:
    """The ranks with which the factors are exact."""
    if kind == "tucker":
        out_channels, in_channels, *kernel = weight.shape
        area = math.prod(kernel)
        return min(in_channels, out_channels * area), min(out_channels, in_channels * area)
    return (min(matrix_of(weight, kind).shape),)


def factors_of(weight: Tensor, kind: Kind, ranks: Ranks, moment: Tensor | None = None) -> list[Tensor]:
    """The weights of the thin layers, in their order, with the weight's type, device and number of dimensions.

    Args:
        weight: the layer's weight, ``[out, in]`` or ``[out, in, kh, kw]``.
        kind: the kind of factors, one of :func:`kinds_of`.
        ranks: one rank, ``(rank,)``, or for ``tucker`` ``(rank_in, rank_out)``; at most :func:`largest_ranks`.
        moment: second moment ``[rows, rows]`` of the responses of :func:`matrix_of`, to keep most of the responses.
            ``None`` keeps most of the weight. ``tucker`` does not use it.
    """
    if kind == "tucker":
        return [factor.to(weight) for factor in _tucker(_exact(weight), *ranks)]
    matrix = matrix_of(weight, kind)
    # `eigh` sorts eigenvalues from the least to the largest: the columns are reversed.
    basis = torch.linalg.eigh(matrix @ matrix.T if moment is None else moment).eigenvectors.flip(1)[:, : ranks[0]]
    inner = basis.T @ matrix
    scale = inner.norm(dim=1).clamp(min=1e-30).sqrt()  # both factors get the same norm: neither learns faster
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
    """The weight of the one layer that computes the same as the thin layers one after the other."""
    if len(factors) == 3:
        first, core, last = factors
        return torch.einsum("oa,abyx,bi->oiyx", last[:, :, 0, 0], core, first[:, :, 0, 0])
    first, second = factors
    if first.dim() == 2:
        return second @ first
    return torch.einsum("oryx,rizw->oizx" if second.shape[3] > 1 else "oryx,rizw->oizw", second, first)


def errors_of(weight: Tensor, kind: Kind, moment: Tensor | None = None) -> Tensor:
    """The share of the sum of squares that each rank loses: of the weight, or with ``moment`` of the responses.

    Returns:
        The shares for the ranks from 0 to the largest, ``[largest + 1]``; for ``tucker``
        ``[largest_in + 1, largest_out + 1]``, as they are before HOOI.
    """
    if kind == "tucker":
        # The squares of the whole core tensor: with lower ranks, the entries beyond them are lost.
        core = _project(_exact(weight), *_hosvd(_exact(weight), *largest_ranks(weight, kind)))
        energy = core.square().sum(dim=(2, 3)).T
        kept = torch.zeros(energy.shape[0] + 1, energy.shape[1] + 1, dtype=torch.float64)
        kept[1:, 1:] = energy.cumsum(0).cumsum(1)
        return _lost(kept, energy)
    matrix = matrix_of(weight, kind)
    energy = torch.linalg.eigvalsh(matrix @ matrix.T if moment is None else moment).flip(0).clamp(min=0)
    kept = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
    return _lost(kept, energy)[: min(matrix.shape) + 1]


def _lost(kept: Tensor, energy: Tensor) -> Tensor:
    """The share of the energy that is not kept; a weight of zeros loses nothing at any rank."""
    whole = energy.sum()
    return 1 - kept / whole if whole.is_meta or whole > 0 else torch.zeros_like(kept)


def _exact(weight: Tensor) -> Tensor:
    """The weight in float64 on the CPU. A weight on the meta device, which has no values yet, stays there."""
    return weight.detach().to("meta" if weight.is_meta else "cpu", torch.float64)


def _tucker(weight: Tensor, rank_in: int, rank_out: int) -> list[Tensor]:
    """HOSVD, then HOOI: each basis is computed again for the weight projected on the other basis."""
    basis_in, basis_out = _hosvd(weight, rank_in, rank_out)
    for _ in range(_SWEEPS):
        basis_out = _basis(torch.einsum("oiyx,ib->obyx", weight, basis_in).flatten(1), rank_out)
        basis_in = _basis(torch.einsum("oiyx,oa->iayx", weight, basis_out).flatten(1), rank_in)
    core = _project(weight, basis_in, basis_out)
    return [basis_in.T[:, :, None, None], core, basis_out[:, :, None, None]]


def _hosvd(weight: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor]:
    """Bases ``[in, rank_in]`` and ``[out, rank_out]`` of the inputs and of the outputs."""
    return _basis(weight.transpose(0, 1).flatten(1), rank_in), _basis(weight.flatten(1), rank_out)


def _basis(matrix: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors, ``[rows, rank]``."""
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]


def _project(weight: Tensor, basis_in: Tensor, basis_out: Tensor) -> Tensor:
    """The core tensor ``[rank_out, rank_in, kh, kw]``: the weight projected on both bases."""
    return torch.einsum("oiyx,ib,oa->abyx", weight, basis_in, basis_out)
