import pytest
import torch
from torch import Tensor, nn

from project.metrics.complexity import (
    complexity_by_layer,
    count_macs,
    count_nonzero,
    count_parameters,
    parameter_bytes,
)
from project.models import SmallInception


class TwoConvs(nn.Module):
    """One grouped and one strided convolution, a batch norm, a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, (1, 5), stride=2)
        )
        self.fc = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.fc(self.body(images).mean((2, 3))))


SHAPE = (4, 9, 11)
# 9 x 11 outputs of 8 channels, each from 2 of the input's 4 channels in 3x3; 5 x 4 outputs of 6, each from 8 in 1x5.
CONV1, CONV2, FC = 9 * 11 * 8 * 2 * 9, 5 * 4 * 6 * 8 * 5, 6 * 6


def test_macs_equal_the_hand_calculation() -> None:
    assert count_macs(TwoConvs(), SHAPE) == CONV1 + CONV2 + 2 * FC
    assert count_macs(TwoConvs(), SHAPE, batch=3) == 3 * (CONV1 + CONV2 + 2 * FC)


def test_rows_equal_the_hand_calculation() -> None:
    rows = [
        (row.name, row.type, row.num_params, row.macs, row.output_shape)
        for row in complexity_by_layer(TwoConvs(), SHAPE)
    ]
    assert rows == [
        ("body.0", "Conv2d", 8 * 2 * 9 + 8, CONV1, (8, 9, 11)),
        ("body.1", "BatchNorm2d", 16, 0, (8, 9, 11)),
        ("body.3", "Conv2d", 6 * 8 * 5 + 6, CONV2, (6, 5, 4)),
        ("fc", "Linear", 6 * 6 + 6, 2 * FC, (6,)),
    ]


def test_columns_add_up_for_a_real_net() -> None:
    net = SmallInception(10, (3, 32, 32))
    rows = complexity_by_layer(net, (3, 32, 32))
    assert sum(row.macs for row in rows) == count_macs(net, (3, 32, 32))
    assert sum(row.num_params for row in rows) == count_parameters(net)


def test_work_of_a_module_itself_is_its_own_row() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.randn(5, 2))
            self.right = nn.Linear(12, 2, bias=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.right(images.flatten(1)) @ self.left.T

    rows = complexity_by_layer(LowRank(), (3, 2, 2))
    assert [(row.name, row.num_params, row.macs) for row in rows] == [("", 10, 10), ("right", 24, 24)]


def test_counting_leaves_the_net_as_it_was() -> None:
    torch.manual_seed(0)
    net = TwoConvs().train()
    net.body[1].eval()
    net.body[1].running_mean.fill_(0.5)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    count_macs(net, SHAPE)
    complexity_by_layer(net, SHAPE)
    assert net.training and net.body[0].training and not net.body[1].training
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_failing_net_is_left_as_it_was_too() -> None:
    net = TwoConvs().train()
    for count in (count_macs, complexity_by_layer):
        with pytest.raises(RuntimeError):
            count(net, (3, 9, 11))
    assert net.training and not any(module._forward_hooks for module in net.modules())
    assert count_macs(net, SHAPE) == CONV1 + CONV2 + 2 * FC


def test_parameters_nonzero_and_bytes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False))
    assert count_parameters(net) == 12 + 4 + 12
    with torch.no_grad():
        net[0].weight.fill_(1.0)[:2] = 0
        net[0].bias.zero_()
        net[1].weight.fill_(-1e-30)
    assert count_nonzero(net) == 6 + 12
    assert parameter_bytes(net) == 28 * 4
    assert parameter_bytes(net.half()) == 28 * 2


def test_shared_parameters_count_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert count_parameters(net) == 9 + 3 + 3
    assert parameter_bytes(net) == 4 * 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nets_of_other_types_are_counted(dtype: torch.dtype) -> None:
    assert count_macs(TwoConvs().to(dtype), SHAPE) == CONV1 + CONV2 + 2 * FC
