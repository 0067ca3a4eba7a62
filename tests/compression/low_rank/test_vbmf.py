"""VBMF finds planted ranks, and by its own free energy no neighbour is better."""

import math

import numpy as np
import pytest
import torch

from project.compression.low_rank.vbmf import vbmf, vbmf_rank


def planted(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    product = draw.standard_normal((rows, rank)) @ draw.standard_normal((rank, columns))
    return product + noise * draw.standard_normal((rows, columns))


@pytest.mark.parametrize("rank", [0, 1, 5, 12])
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (50, 50), (30, 400)])
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_the_planted_rank_and_noise_are_found(size, rank, noise):
    matrix = planted(*size, rank, noise)
    found, variance = vbmf(np.linalg.svd(matrix, compute_uv=False), *size)
    assert found == rank == vbmf_rank(torch.from_numpy(matrix))
    assert variance == pytest.approx(noise**2, rel=0.25)


def test_without_noise_and_of_nothing():
    assert vbmf_rank(torch.from_numpy(planted(20, 30, 4, 0.0))) == 4
    assert vbmf_rank(torch.zeros(20, 30)) == 0


def free_energy(values: np.ndarray, short: int, long: int, rank: int) -> float:
    """Twice the free energy (Nakajima et al. 2013, JMLR 14, eq. 15) with the first ``rank`` components there, by
    coordinate descent on means, variances, prior variances and noise: none of the closed forms.
    """
    variance = (values[rank:] ** 2).sum() / (short * long)
    parts = []
    for _ in range(3000):
        if not parts:
            parts = [[math.sqrt(g), math.sqrt(g), 1e-3, 1e-3] for g in values[:rank]]
        for part, g in zip(parts, values, strict=False):
            a, b, spread_a, spread_b = part
            prior_a, prior_b = a * a / long + spread_a, b * b / short + spread_b
            spread_a = variance / (b * b + short * spread_b + variance / prior_a)
            a = g * b * spread_a / variance
            spread_b = variance / (a * a + long * spread_a + variance / prior_b)
            b = g * a * spread_b / variance
            part[:] = a, b, spread_a, spread_b
        residual = (values**2).sum()
        for (a, b, spread_a, spread_b), g in zip(parts, values, strict=False):
            residual += (a * a + long * spread_a) * (b * b + short * spread_b) - 2 * g * a * b
        before, variance = variance, residual / (short * long)
        if abs(variance - before) < 1e-13 * before:
            break
    energy = short * long * math.log(2 * math.pi * variance) + residual / variance
    for a, b, spread_a, spread_b in parts:
        prior_a, prior_b = a * a / long + spread_a, b * b / short + spread_b
        energy += long * math.log(prior_a / spread_a) + short * math.log(prior_b / spread_b)
    return energy


@pytest.mark.parametrize(("rank", "noise"), [(3, 0.5), (6, 1.0), (6, 2.5)])
def test_no_neighbour_has_less_free_energy(rank, noise):
    values = np.linalg.svd(planted(16, 24, rank, noise, seed=1), compute_uv=False)
    found, _ = vbmf(values, 16, 24)
    energies = {number: free_energy(values, 16, 24, number) for number in range(max(found - 2, 0), found + 3)}
    assert found == min(energies, key=energies.__getitem__), energies
