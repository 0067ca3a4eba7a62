import math

import pytest
import torch
from torch import nn

from project.metrics.complexity import count_macs, count_parameters
from project.models import BatchNorm, LeNet5, LeNet300100

MNIST = (1, 28, 28)


def test_lenet_300_100_has_the_papers_266_610_parameters() -> None:
    net = LeNet300100(10, MNIST)
    sizes = {name: layer.weight.numel() for name, layer in net.named_children() if isinstance(layer, nn.Linear)}
    assert sizes == {"fc1": 235_200, "fc2": 30_000, "fc3": 1_000}  # Han et al. 2015, table 3: 235K, 30K, 1K
    assert count_parameters(net) == 266_610
    assert count_macs(net, MNIST) == 266_200


def test_lenet_5_has_the_papers_431_080_parameters() -> None:
    net = LeNet5(10, MNIST)
    layers = {"conv1": net.conv1.conv, "conv2": net.conv2.conv, "fc1": net.fc1, "fc2": net.fc2}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    # Han et al. 2015, table 4: 0.5K, 25K, 400K, 5K.
    assert sizes == {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "fc2": 5_000}
    assert count_parameters(net) == 431_080
    assert count_macs(net, MNIST) == 500 * 24 * 24 + 25_000 * 8 * 8 + 400_000 + 5_000


def test_keys_are_stable_and_norms_replace_biases() -> None:
    assert list(LeNet300100(10, MNIST).state_dict()) == [
        f"{layer}.{kind}" for layer in ("fc1", "fc2", "fc3") for kind in ("weight", "bias")
    ]
    assert list(LeNet5(10, MNIST).state_dict()) == [
        f"{layer}.{kind}" for layer in ("conv1.conv", "conv2.conv", "fc1", "fc2") for kind in ("weight", "bias")
    ]
    normed = set(LeNet300100(10, MNIST, norm=BatchNorm).state_dict())
    assert "norm1.running_mean" in normed and not {"fc1.bias", "fc2.bias"} & normed
    normed = set(LeNet5(10, MNIST, norm=BatchNorm).state_dict())
    assert "norm1.running_mean" in normed and not {"conv1.conv.bias", "fc1.bias"} & normed


def test_lenet_300_100_starts_from_glorot_normal() -> None:
    torch.manual_seed(0)
    net = LeNet300100(10, MNIST)
    for layer in (net.fc1, net.fc2):
        expected = math.sqrt(2 / (layer.in_features + layer.out_features))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)


def test_caffe_s_convolutions_have_no_activation() -> None:
    """Up to the pooling: the net without its hidden ReLU and biases is piecewise linear through max alone."""
    net = LeNet5(10, MNIST)
    images = torch.randn(2, *MNIST)
    torch.testing.assert_close(net(images), 0.5 * net(2 * images), atol=1e-5, rtol=1e-4)  # biases start at zero
    assert net.pool(net.conv1(images)).min() < 0
    assert LeNet5(10, MNIST, conv_activation=nn.ReLU).conv1(images).min() == 0


def test_batch_norm_on_vectors_is_that_of_batch_norm_1d() -> None:
    torch.manual_seed(0)
    net = LeNet300100(10, (1, 4, 4), norm=BatchNorm)
    images = torch.randn(8, 1, 4, 4)
    x = net.fc1(images.flatten(1))
    expected = nn.BatchNorm1d(300)(x).relu()
    seen: list[torch.Tensor] = []
    net.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(images)
    torch.testing.assert_close(seen[0], expected)
