"""Landscape, sharpness and eigenvalues of quadratics, against their closed forms."""

import math

import pytest
import torch
from torch import nn

from project.metrics.probes import loss_landscape, sharpness, top_eigenvalue, top_eigenvalues

DTYPES = [torch.float32, torch.float64]


def quadratic(matrix, start, offset=0.0, dtype=torch.float64):
    """``x H x / 2 + offset`` with x in two parameters of different shapes."""
    matrix, start = matrix.to(dtype), start.to(dtype)
    parameters = [nn.Parameter(start[:4].clone().view(2, 2)), nn.Parameter(start[4:].clone())]

    def objective():
        x = torch.cat([parameter.reshape(-1) for parameter in parameters])
        return x @ matrix @ x / 2 + offset

    return objective, parameters


def random_matrix(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


START = torch.linspace(-1.5, 2, 10, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_landscape_of_a_quadratic_is_its_closed_form(dtype):
    matrix = random_matrix([-2.0, -1, 0, 0.5, 1, 2, 3, 4, 5, 6])
    objective, parameters = quadratic(matrix, START, 3.0, dtype)
    before = [parameter.detach().clone() for parameter in parameters]
    distances = [0.05, 0.1, 0.4]
    found = loss_landscape(objective, parameters, distances)

    gradient = matrix @ START
    curved = matrix @ gradient  # g(x) - g(x - eta g) = eta H g
    loss = START @ gradient / 2 + 3
    losses = [loss - eta * gradient @ gradient + eta**2 / 2 * gradient @ curved for eta in distances]
    tolerance = {"rtol": 1e-4 if dtype == torch.float32 else 1e-10, "atol": 1e-5 if dtype == torch.float32 else 1e-10}
    assert math.isclose(found.loss, loss, rel_tol=1e-5)
    assert math.isclose(found.gradient_norm, gradient.norm(), rel_tol=1e-5)
    torch.testing.assert_close(found.losses, torch.stack(losses), **tolerance)
    expected = torch.tensor(distances, dtype=torch.float64) * curved.norm()
    torch.testing.assert_close(found.gradient_changes, expected, **tolerance)
    assert math.isclose(found.smoothness, curved.norm() / gradient.norm(), rel_tol=1e-4)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)


def test_without_a_gradient_there_is_no_smoothness():
    objective, parameters = quadratic(random_matrix([1.0] * 10), torch.zeros(10))
    found = loss_landscape(objective, parameters, [0.1])
    assert found.gradient_norm == 0 and math.isnan(found.smoothness)


def test_the_landscape_puts_the_parameters_back_after_an_error():
    objective, parameters = quadratic(random_matrix([1.0] * 10), START)
    before, calls = parameters[0].detach().clone(), []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no more images")
        return objective()

    with pytest.raises(OSError):
        loss_landscape(failing, parameters, [0.1, 0.2])
    assert torch.equal(parameters[0], before)


def greatest_rise(diagonal, start, epsilon):
    """Of ``sum h x^2 / 2`` over the box, coordinate by coordinate: at a corner, or inside where it bends down."""
    rise = 0.0
    for h, x in zip(diagonal.tolist(), start.tolist(), strict=True):
        b = epsilon * (abs(x) + 1)
        places = [-b, b] + ([-x] if h < 0 and abs(x) <= b else [])
        rise += max(h * ((x + z) ** 2 - x**2) / 2 for z in places)
    return rise


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4, 0.1, 0.5])
@pytest.mark.parametrize(
    "start", [torch.zeros(10), START, torch.tensor([0.0, 1e-4, -1e-4, 0, 0, 0.3, -0.2, 0, 1e-6, 0])], ids=str
)
@pytest.mark.parametrize(
    "diagonal",
    [torch.linspace(0.5, 5, 10), torch.logspace(-4, 3, 10), torch.tensor([-2.0, -0.5, 0, 0, 1, 2, 3, 4, 5, 6])],
    ids=["even", "ill-conditioned", "indefinite"],
)
def test_the_sharpness_of_a_diagonal_quadratic(diagonal, start, epsilon):
    start, diagonal = start.double(), diagonal.double()
    offset = 20.0  # so that f > -1
    objective, parameters = quadratic(torch.diag(diagonal), start, offset)
    rise = greatest_rise(diagonal, start, epsilon)
    expected = 100 * rise / (1 + objective().item())
    assert math.isclose(sharpness(objective, parameters, epsilon), expected, rel_tol=1e-3, abs_tol=1e-12)


def test_the_sharpness_in_a_subspace():
    """Of a linear loss the maximum over the box is known: ``sum |A^T g| b``."""
    slope = torch.linspace(-1, 3, 10, dtype=torch.float64)
    _, parameters = quadratic(torch.eye(10), START)

    def objective():
        return torch.cat([parameter.reshape(-1) for parameter in parameters]) @ slope + 20

    axes = torch.randn(10, 3, generator=torch.Generator().manual_seed(7)).double()
    axes /= axes.norm(dim=0)
    bounds = 1e-3 * ((torch.linalg.pinv(axes) @ START).abs() + 1)
    expected = 100 * (bounds * (axes.T @ slope).abs()).sum() / (1 + objective().detach())
    assert math.isclose(sharpness(objective, parameters, 1e-3, 3, seed=7), expected, rel_tol=1e-6)
    assert sharpness(objective, parameters, 1e-3, 10, seed=7) > 0
    assert torch.equal(parameters[1], START[4:])


def test_the_sharpness_of_a_flat_or_broken_loss():
    _, parameters = quadratic(torch.eye(10), START)
    assert sharpness(lambda: parameters[0].sum() * 0 + 1, parameters) == 0
    assert math.isnan(sharpness(lambda: parameters[0].sum() * torch.nan, parameters))


def test_sharpness_draws_no_global_random_number():
    objective, parameters = quadratic(torch.eye(10), START)
    before = torch.get_rng_state()
    first = sharpness(objective, parameters, subspace=2, seed=3)
    assert first == sharpness(objective, parameters, subspace=2, seed=3)
    top_eigenvalue(objective, parameters)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lowest", [-1.0, -50.0])
def test_the_top_eigenvalue_is_the_algebraically_largest(lowest, dtype):
    matrix = random_matrix([lowest, -0.5, 0, 0, 0.1, 0.2, 0.3, 1, 2, 7])
    objective, parameters = quadratic(matrix, START, dtype=dtype)
    assert math.isclose(top_eigenvalue(objective, parameters), 7, rel_tol=1e-3)
    assert top_eigenvalues(objective, parameters, 3) == pytest.approx([7, 2, 1], rel=1e-3)


def test_eigenvalues_of_special_matrices():
    for values, top in (([3.0] * 10, 3), ([0.0] * 10, 0), ([-5.0] * 9 + [-2.0], -2)):
        objective, parameters = quadratic(random_matrix(values), START)
        assert top_eigenvalue(objective, parameters) == pytest.approx(top, abs=1e-9)
    objective, parameters = quadratic(random_matrix([4.0] * 3 + [1.0] * 7), START)
    assert top_eigenvalues(objective, parameters, 10) == pytest.approx([4.0] * 3 + [1.0] * 7)
    assert top_eigenvalue(lambda: parameters[0].sum(), parameters) == 0  # linear: no second derivative


def test_many_values_need_few_iterations():
    values = torch.cat([torch.linspace(-1, 1, 498), torch.tensor([5.0, 10])]).double()
    x = nn.Parameter(torch.ones(500, dtype=torch.float64))
    calls = []

    def objective():
        calls.append(1)
        return (values * x * x).sum() / 2

    assert top_eigenvalues(objective, [x], 2) == pytest.approx([10, 5], rel=1e-3)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (lambda f, p: loss_landscape(f, p, []), "distances is empty"),
        (lambda f, p: loss_landscape(f, p, [0.1, 0.0]), "distances has 0.0, but a step size is above 0"),
        (lambda f, p: loss_landscape(f, [], [0.1]), "parameters is empty"),
        (lambda f, p: loss_landscape(lambda: p[0], p, [0.1]), r"objective gives a tensor \[2, 2\]"),
        (lambda f, p: loss_landscape(lambda: 1.0, p, [0.1]), "objective gives a float"),
        (lambda f, p: loss_landscape(lambda: f().detach(), p, [0.1]), "objective gives a loss without a graph"),
        (lambda f, p: loss_landscape(f, [*p, nn.Parameter(torch.ones(1))], [0.1]), "differ in type or device"),
        (lambda f, p: loss_landscape(f, [nn.Parameter(torch.ones(1), False)], [0.1]), "1 without requires_grad"),
        (lambda f, p: sharpness(f, p, 0.0), "epsilon is 0.0"),
        (lambda f, p: sharpness(f, p, subspace=0), "subspace is 0"),
        (lambda f, p: sharpness(f, p, subspace=11), "subspace is 11, but there are 10 parameters"),
        (lambda f, p: sharpness(f, p, iterations=0), "iterations is 0"),
        (lambda f, p: top_eigenvalues(f, p, 0), "count is 0"),
        (lambda f, p: top_eigenvalues(f, p, 11), "count is 11"),
        (lambda f, p: top_eigenvalues(f, p, 3, iterations=2), "iterations is 2"),
        (lambda f, p: top_eigenvalue(f, p, tolerance=-1.0), "tolerance is -1.0"),
    ],
)
def test_a_bad_argument_is_one_sentence(measure, words):
    objective, parameters = quadratic(torch.eye(10), START)
    with pytest.raises(ValueError, match=words) as caught:
        measure(objective, parameters)
    assert "\n" not in str(caught.value)
