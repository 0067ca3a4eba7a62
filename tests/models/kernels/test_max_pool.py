"""Max pooling against torch's: the same values, the same winners."""

import pytest
import torch
from torch import nn

from project.models.layers import MaxPool

pytestmark = pytest.mark.usefixtures("kernels")
CASES = [
    # kernel, stride, padding, ceil_mode, shape
    (2, 2, 0, True, (3, 16, 7, 7)),
    (2, 2, 0, False, (3, 16, 7, 6)),
    (3, 1, 1, False, (3, 16, 7, 5)),
    (3, 2, 0, True, (2, 8, 13, 14)),
    (3, 2, 1, False, (2, 8, 13, 14)),
    (2, 3, 1, True, (2, 8, 11, 9)),
    (5, 2, 2, True, (2, 24, 11, 9)),
    (2, 2, 0, True, (2, 136, 5, 4)),
    (3, 1, 1, False, (2, 120, 4, 5)),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_winners_are_torchs(
    kernel: int, stride: int, padding: int, ceil_mode: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Few different numbers, so that windows hold equal ones: the first wins."""
    torch.manual_seed(0)
    x = torch.randint(-4, 5, shape).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    exact_x = x.detach().clone().requires_grad_()
    y = MaxPool(kernel, stride, padding, ceil_mode=ceil_mode)(x)
    exact = nn.functional.max_pool2d(exact_x, kernel, stride, padding, ceil_mode=ceil_mode)
    assert "_MaxPool" in type(y.grad_fn).__name__
    grad = torch.randint(-4, 5, exact.shape).to(dtype)
    y.backward(grad)
    exact.backward(grad)
    assert torch.equal(y, exact)
    assert torch.equal(x.grad, exact_x.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 8, 2, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 1, 0, 0], x[0, 2, :, :2], x[0, 3, 1, 3] = torch.nan, torch.inf, -torch.inf, -torch.nan
    x[0, 4] = -1e-30
    pool = MaxPool(2)
    x.requires_grad_()
    torch.testing.assert_close(pool(x), nn.functional.max_pool2d(x, 2), equal_nan=True, rtol=0, atol=0)


def test_what_it_leaves_to_torch() -> None:
    last = torch.channels_last
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=last).requires_grad_()
    assert "_MaxPool" not in type(MaxPool(2).eval()(x).grad_fn).__name__
    assert "_MaxPool" not in type(MaxPool((2, 1))(x).grad_fn).__name__
    assert "_MaxPool" not in type(MaxPool(2, dilation=2)(x).grad_fn).__name__
    with pytest.raises(RuntimeError, match="too small"):
        MaxPool(3)(torch.randn(1, 8, 2, 2).contiguous(memory_format=last))
