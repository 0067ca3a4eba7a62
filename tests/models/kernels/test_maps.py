"""What the kernels take: addresses are checked in one place, classes are known exactly."""

import pytest
import torch
from torch import Tensor, nn

from project.models.kernels.known import is_known
from project.models.kernels.maps import address, pointer
from project.models.layers import BatchNorm, MaxPool, ReLU

LAST = torch.channels_last
WRONG: dict[str, Tensor] = {
    "too short": torch.zeros(7),
    "too long": torch.zeros(9),
    "another type": torch.zeros(8, dtype=torch.bfloat16),
    "integers of that size": torch.zeros(8, dtype=torch.int32),
    "gaps": torch.zeros(16)[::2],
    "expanded": torch.zeros(1).expand(8),
    "another device": torch.zeros(8, device="meta"),
    "sparse": torch.zeros(8).to_sparse(),
    "another sign": torch._neg_view(torch.zeros(8)),
    "a class": torch.zeros(8).as_subclass(type("Own", (Tensor,), {})),
}


@pytest.mark.parametrize("what", WRONG)
def test_memory_that_c_would_misread_has_no_address(what: str) -> None:
    assert address(WRONG[what], torch.float32, 8) == 0
    with pytest.raises(AssertionError, match=r"wants 8 values of torch.float32"):
        pointer(WRONG[what], torch.float32, 8)


def test_an_address_is_the_tensors() -> None:
    for x in (torch.zeros(8), nn.Parameter(torch.zeros(2, 4)), torch.zeros(16)[8:]):
        assert address(x, torch.float32, 8) == pointer(x, torch.float32, 8) == x.data_ptr()
    assert address(None, torch.float32, 8) == 0


def test_the_order_counts() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert pointer(x, x.dtype, 120) and pointer(x.transpose(2, 3), x.dtype, 120, None)
    assert address(x, x.dtype, 120, LAST) == address(x.contiguous(memory_format=LAST), x.dtype, 120) == 0


def test_a_class_is_known_exactly() -> None:
    for layer, kind in [(BatchNorm(8), nn.BatchNorm2d), (ReLU(), nn.ReLU), (MaxPool(2), nn.MaxPool2d)]:
        assert is_known(layer, kind) and not is_known(layer, nn.Conv2d)
        layer.__class__ = type("Own", (type(layer),), {})
        assert not is_known(layer, kind)
    assert not is_known(nn.ReLU6(), nn.ReLU)
