"""Batch norm with ReLU against torch in float64: values, gradients, running statistics."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from project.models.kernels import batch_norm_relu
from project.models.layers import BatchNorm, ConvNormAct

pytestmark = pytest.mark.usefixtures("kernels")
SHAPES = [(5, 8, 7, 7), (3, 24, 5, 6), (64, 48, 7, 7), (2, 136, 4, 3), (1, 40, 3, 3), (130, 72, 1, 1), (2, 16, 1, 9)]


def random_norm(channels: int) -> BatchNorm:
    norm = BatchNorm(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def error(given: Tensor | None, exact: Tensor | None) -> float:
    assert given is not None and exact is not None
    return float((given.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_it_is_batch_norm_then_relu(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = random_norm(shape[1])
    exact_norm = deepcopy(norm).double()
    x = (3 * torch.randn(shape) + 20).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    grad = torch.randn(shape[0], shape[1] + 16, *shape[2:]).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = grad[:, 8:-8]  # as behind a concatenation: rows lie apart

    y, exact = batch_norm_relu(x, norm, nn.ReLU()), torch.relu(exact_norm(exact_x))
    assert y is not None
    y.backward(grad)
    exact.backward(grad.double())

    assert error(y, exact) < tolerance
    assert error(x.grad, exact_x.grad) < tolerance
    assert error(norm.weight.grad, exact_norm.weight.grad) < 1e-5
    assert error(norm.bias.grad, exact_norm.bias.grad) < 1e-5
    assert error(norm.running_mean, exact_norm.running_mean) < 1e-5
    assert error(norm.running_var, exact_norm.running_var) < 1e-5
    assert norm.num_batches_tracked == 1


def test_a_large_mean_costs_no_digits() -> None:
    """The difference of a mean of squares and a squared mean would lose all of them here."""
    x = (torch.randn(64, 8, 4, 4) * 1e-2 + 100).contiguous(memory_format=torch.channels_last)
    norm = BatchNorm(8)
    y = batch_norm_relu(x, norm, nn.ReLU())
    assert error(y, torch.relu(BatchNorm(8).double()(x.double()))) < 1e-3


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(64, 24, 7, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        norm = BatchNorm(24)
        y = batch_norm_relu(x, norm, nn.ReLU())
        assert y is not None
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias])])
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_nan_goes_through() -> None:
    x = torch.randn(4, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    x[0, 3, 0, 0] = torch.nan
    y = batch_norm_relu(x, BatchNorm(8), nn.ReLU())
    assert y is not None
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()


def test_a_layer_trains_the_same_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fused = ConvNormAct(8, 16, 3).to(memory_format=torch.channels_last)
    plain = deepcopy(fused)
    x = torch.randn(8, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    y = fused(x)
    assert "BatchNormReLU" in type(y.grad_fn).__name__
    y.square().sum().backward()
    monkeypatch.setattr("project.models.kernels.batch_norm_relu", lambda *_: None)
    expected = plain(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for one, two in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-3)


def test_what_it_leaves_to_torch() -> None:
    last = torch.channels_last
    x = torch.randn(4, 8, 3, 3).contiguous(memory_format=last)
    listened = BatchNorm(8)
    listened.register_forward_hook(lambda *_: None)
    assert batch_norm_relu(x, BatchNorm(8), nn.ReLU()) is not None
    assert batch_norm_relu(x, BatchNorm(8), nn.SiLU()) is None
    assert batch_norm_relu(x, nn.GroupNorm(2, 8), nn.ReLU()) is None
    assert batch_norm_relu(x, BatchNorm(8).eval(), nn.ReLU()) is None
    assert batch_norm_relu(x, listened, nn.ReLU()) is None
    assert batch_norm_relu(x.contiguous(), BatchNorm(8), nn.ReLU()) is None
    assert batch_norm_relu(x.double(), BatchNorm(8), nn.ReLU()) is None
    with torch.no_grad():
        assert batch_norm_relu(x, BatchNorm(8), nn.ReLU()) is None
    twelve = torch.randn(4, 12, 3, 3).contiguous(memory_format=last)
    assert batch_norm_relu(twelve, BatchNorm(12), nn.ReLU()) is None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ConvNormAct(8, 8)(torch.randn(1, 8, 1, 1))
