"""Batch norm, ReLU and max pooling 2x2 in one against torch in float64: values, gradients, running statistics."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from project.models.kernels import batch_norm_relu_pool
from project.models.layers import BatchNorm, ConvNormAct, MaxPool

pytestmark = pytest.mark.usefixtures("kernels")
SHAPES = [(5, 8, 8, 8), (3, 24, 7, 6), (9, 64, 14, 14), (2, 72, 5, 9), (1, 40, 3, 3), (4, 16, 1, 9), (2, 48, 6, 1)]


def random_norm(channels: int) -> BatchNorm:
    """Weights of either sign: below 0 the least pixel of a window wins."""
    norm = BatchNorm(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def error(given: Tensor | None, exact: Tensor | None) -> float:
    assert given is not None and exact is not None
    return float((given.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max().clamp(min=1e-12))


def check(x: Tensor, norm: BatchNorm, pool: MaxPool, tolerance: float) -> None:
    exact_norm = deepcopy(norm).double()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact = batch_norm_relu_pool(x, norm, nn.ReLU(), pool), pool(torch.relu(exact_norm(exact_x)))
    assert y is not None and y.dtype == x.dtype and y.shape == exact.shape
    count, channels, *sides = y.shape
    grad = torch.randn(count, channels + 16, *sides).to(x.dtype).contiguous(memory_format=torch.channels_last)
    grad = grad[:, 8:-8]  # as behind a concatenation: rows lie apart
    y.backward(grad)
    exact.backward(grad.double())
    assert error(y, exact) < tolerance
    assert error(x.grad, exact_x.grad) < tolerance
    assert error(norm.weight.grad, exact_norm.weight.grad) < 1e-5
    assert error(norm.bias.grad, exact_norm.bias.grad) < 1e-5
    assert error(norm.running_mean, exact_norm.running_mean) < 1e-5
    assert error(norm.running_var, exact_norm.running_var) < 1e-5
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_it_is_the_three_operations(
    shape: tuple[int, ...], ceil_mode: bool, dtype: torch.dtype, tolerance: float
) -> None:
    if not ceil_mode and min(shape[2:]) < 2:
        pytest.skip("torch refuses an empty map")
    torch.manual_seed(0)
    check((3 * torch.randn(shape) + 20).to(dtype), random_norm(shape[1]), MaxPool(2, ceil_mode=ceil_mode), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_pixels_the_first_wins(dtype: torch.dtype) -> None:
    """Few different numbers; and weights of 0, of whose pixels all are equal."""
    torch.manual_seed(0)
    norm = random_norm(24)
    with torch.no_grad():
        norm.weight[::3] = 0
        norm.bias[::3] = 1
    check(torch.randint(-2, 3, (6, 24, 9, 9)).to(dtype), norm, MaxPool(2, ceil_mode=True), 2**-8)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 24, 7, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        norm = BatchNorm(24)
        y = batch_norm_relu_pool(x, norm, nn.ReLU(), MaxPool(2, ceil_mode=True))
        assert y is not None
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias])])
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_goes_through(value: float) -> None:
    x = torch.randn(4, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 3, 0, 0] = value
    x.requires_grad_()
    y = batch_norm_relu_pool(x, BatchNorm(8), nn.ReLU(), MaxPool(2))
    assert y is not None
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[:, 3].isnan().all() and not x.grad[:, :3].isnan().any()


def test_a_layer_trains_the_same_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fused = ConvNormAct(8, 16, 3, pool=lambda: MaxPool(2, ceil_mode=True)).to(memory_format=torch.channels_last)
    plain = deepcopy(fused)
    x = torch.randn(8, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    y = fused(x)
    assert "BatchNormReLUPool" in type(y.grad_fn).__name__
    y.square().sum().backward()
    monkeypatch.setattr("project.models.kernels.batch_norm_relu_pool", lambda *_: None)
    expected = plain(x)
    assert "BatchNormReLUPool" not in type(expected.grad_fn).__name__
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for one, two in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-3)


def test_what_it_leaves_to_torch() -> None:
    last = torch.channels_last
    x = torch.randn(4, 8, 4, 4).contiguous(memory_format=last)

    def taken(
        x: Tensor = x, norm: nn.Module | None = None, relu: nn.Module | None = None, pool: nn.Module | None = None
    ) -> bool:
        modules = norm or BatchNorm(x.shape[1]), relu or nn.ReLU(), pool or nn.MaxPool2d(2)
        return batch_norm_relu_pool(x, *modules) is not None

    listened = nn.MaxPool2d(2)
    listened.register_forward_hook(lambda *_: None)
    assert taken() and taken(pool=MaxPool(2, ceil_mode=True))
    for other in (nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 2, 1), nn.AvgPool2d(2), listened):
        assert not taken(pool=other), other
    for other in (nn.GroupNorm(2, 8), BatchNorm(8).eval()):
        assert not taken(norm=other), other
    assert not taken(relu=nn.SiLU())
    assert not taken(x.contiguous()) and not taken(x.double())
    assert not taken(torch.randn(4, 12, 4, 4).contiguous(memory_format=last))
    assert not taken(torch.randn(4, 8, 1, 4).contiguous(memory_format=last))
    with torch.no_grad():
        assert not taken()
    with pytest.raises(RuntimeError, match="too small"):
        ConvNormAct(8, 8, pool=lambda: MaxPool(2))(torch.randn(2, 8, 1, 4).contiguous(memory_format=last))
