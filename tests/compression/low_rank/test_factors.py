"""Factors do what the papers promise: the whole weight at full rank, what is discarded lost at less, never more at a
higher rank.
"""

import pytest
import torch
from torch import Tensor, nn

from project.compression.low_rank.factors import errors_of, factors_of, kinds_of, largest_ranks, matrix_of, product_of
from project.compression.low_rank.thin_layers import thin_layers

SHAPES = {"linear": (12, 20), "1x1": (12, 20, 1, 1), "3x3": (10, 6, 3, 3), "5x3": (6, 8, 5, 3), "1x7": (9, 4, 1, 7)}
CASES = [(shape, kind) for shape in SHAPES for kind in kinds_of(torch.empty(SHAPES[shape]))]


def weight_of(shape: str) -> Tensor:
    return torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error(weight: Tensor, factors: list[Tensor]) -> float:
    return float((weight - product_of(factors)).square().sum() / weight.square().sum())


def test_kernels_with_one_row_or_column_have_nothing_to_separate():
    kinds = {shape: kinds_of(torch.empty(size)) for shape, size in SHAPES.items()}
    whole = ("svd", "spatial", "tucker")
    assert kinds == {"linear": ("svd",), "1x1": ("svd",), "1x7": ("svd",), "3x3": whole, "5x3": whole}


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_full_rank_loses_nothing_and_each_rank_what_is_said(shape, kind):
    weight = weight_of(shape)
    full = largest_ranks(weight, kind)
    assert error(weight, factors_of(weight, kind, full)) < 1e-20
    errors = errors_of(weight, kind)
    assert list(errors.shape) == [rank + 1 for rank in full] and abs(errors[full]) < 1e-12
    ranks = [(r,) for r in range(1, full[0])] if len(full) == 1 else [(2, 3), (4, 3), (4, 6), (full[0] - 1, 5)]
    for rank in ranks:
        measured = error(weight, factors_of(weight, kind, rank))
        if kind == "tucker":  # HOOI only improves on it
            assert 0 < measured <= errors[rank] + 1e-12
        else:
            assert measured == pytest.approx(float(errors[rank]), rel=1e-9)


@pytest.mark.parametrize(("shape", "kind"), [case for case in CASES if case[1] != "tucker"])
def test_the_error_is_the_discarded_singular_values(shape, kind):
    weight = weight_of(shape)
    values = torch.linalg.svdvals(matrix_of(weight, kind)).square()
    for rank in range(1, len(values)):
        discarded = values[rank:].sum() / values.sum()
        assert error(weight, factors_of(weight, kind, (rank,))) == pytest.approx(float(discarded), rel=1e-9)


@pytest.mark.parametrize("shape", ["3x3", "5x3"])
def test_tuckers_error_falls_with_either_rank_and_sweeps_find_planted_ranks(shape):
    weight = weight_of(shape)
    full = largest_ranks(weight, "tucker")
    table = torch.tensor(
        [
            [error(weight, factors_of(weight, "tucker", (a, b))) for b in range(1, full[1] + 1)]
            for a in range(1, full[0] + 1)
        ]
    )
    assert (table.diff(dim=0) < 1e-6).all() and (table.diff(dim=1) < 1e-6).all()
    generator = torch.Generator().manual_seed(1)
    core = torch.randn(3, 2, *SHAPES[shape][2:], generator=generator, dtype=torch.float64)
    into = torch.randn(2, SHAPES[shape][1], 1, 1, generator=generator, dtype=torch.float64)
    out = torch.randn(SHAPES[shape][0], 3, 1, 1, generator=generator, dtype=torch.float64)
    planted = product_of([into, core, out])
    assert error(planted, factors_of(planted, "tucker", (2, 3))) < 1e-20
    assert error(planted, factors_of(planted, "tucker", (1, 3))) > 1e-3


@pytest.mark.parametrize("kind", ["svd", "spatial"])
def test_with_a_moment_the_responses_are_kept(kind):
    """Against a search that knows nothing of eigenvectors: alternating least squares get no lower."""
    weight = weight_of("3x3")
    matrix = matrix_of(weight, kind)
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(matrix.shape[1], matrix.shape[1], generator=generator, dtype=torch.float64)
    patches = torch.randn(400, matrix.shape[1], generator=generator, dtype=torch.float64) @ (mixing / 4) ** 3
    responses = patches @ matrix.T
    moment = responses.T @ responses

    def lost(factors: list[Tensor]) -> float:
        rest = patches @ matrix_of(weight - product_of(factors), kind).T
        return float(rest.square().sum() / responses.square().sum())

    errors = errors_of(weight, kind, moment)
    for rank in (2, 5, 8):
        aware, plain = lost(factors_of(weight, kind, (rank,), moment)), lost(factors_of(weight, kind, (rank,)))
        assert aware == pytest.approx(float(errors[rank]), rel=1e-6) and aware < 0.95 * plain
        left = torch.randn(matrix.shape[0], rank, generator=generator, dtype=torch.float64)
        for _ in range(300):
            right = torch.linalg.lstsq(left, matrix).solution
            left = torch.linalg.lstsq(patches @ right.T, responses).solution.T
        found = float((responses - patches @ (left @ right).T).square().sum() / responses.square().sum())
        assert aware <= found + 1e-9 and found < 1.01 * aware


LAYERS = {
    "plain": nn.Conv2d(6, 10, 3, padding=1),
    "stride": nn.Conv2d(6, 10, (3, 5), stride=(2, 1), padding=(0, 2), bias=False),
    "dilation": nn.Conv2d(6, 10, 3, stride=2, padding=2, dilation=(2, 1)),
    "same": nn.Conv2d(6, 10, 3, padding="same", dilation=2),
    "reflect": nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"),
    "1x1": nn.Conv2d(6, 10, 1, stride=2),
    "linear": nn.Linear(6, 10),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_thin_layers_at_full_rank_are_the_layer(name, channels_last):
    layer = LAYERS[name].double()
    images = torch.randn(2, 6, 12, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if isinstance(layer, nn.Linear):
        images = images.flatten(2).transpose(1, 2)
    elif channels_last:
        layer.to(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    for kind in kinds_of(layer.weight):
        thin = thin_layers(layer, kind, largest_ranks(layer.weight, kind))
        assert torch.allclose(thin(images), layer(images), atol=1e-12)
        assert [type(each) for each in thin] == [type(layer)] * len(thin)
        biases = [each.bias is not None for each in thin]
        assert biases == [False] * (len(thin) - 1) + [layer.bias is not None]
        if layer.weight.dim() == 4 and not layer.weight.is_contiguous():
            assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in thin)
    assert torch.equal(state, torch.get_rng_state()), "no random number is drawn"
