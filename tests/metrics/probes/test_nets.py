"""Probes of real nets: eigenvalues beside torch.func.hessian, norms and zeros by hand, the line between two nets."""

import pytest
import torch
from helpers.versioned_net import Versioned
from torch import nn
from torch.func import functional_call, hessian

from project.metrics.probes import (
    activation_sparsity,
    gradient_norms,
    interpolate,
    loss_and_accuracy,
    state_between,
    top_eigenvalue,
    top_eigenvalues,
)
from project.models import SmallInception


def conv_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    ).double()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # functorch uses it
def test_the_eigenvalues_of_a_conv_net_are_those_of_the_whole_hessian():
    net, images, labels = conv_net(), torch.randn(16, 1, 8, 8).double(), torch.arange(16) % 3
    parameters = dict(net.named_parameters())

    def loss_of(*values):
        logits = functional_call(net, dict(zip(parameters, values, strict=True)), images)
        return nn.functional.cross_entropy(logits, labels)

    net.eval()  # functorch cannot update running statistics in place
    blocks = hessian(loss_of, argnums=tuple(range(len(parameters))))(*parameters.values())
    sizes = [parameter.numel() for parameter in parameters.values()]
    whole = torch.cat(
        [
            torch.cat([b.reshape(i, j) for b, j in zip(row, sizes, strict=True)], 1)
            for row, i in zip(blocks, sizes, strict=True)
        ]
    )
    expected = torch.linalg.eigvalsh(whole.detach()).flip(0)

    def objective():
        return nn.functional.cross_entropy(net(images), labels)

    own = list(parameters.values())
    assert top_eigenvalue(objective, own, 40) == pytest.approx(expected[0].item(), rel=1e-6)
    assert top_eigenvalues(objective, own, 3, 60, 1e-6) == pytest.approx(expected[:3].tolist(), rel=1e-5)


def test_the_kernels_and_torch_agree_on_the_eigenvalue(monkeypatch):
    """The kernels compute the second derivative by torch's operators."""

    def measure(switch):
        monkeypatch.setenv("PROJECT_KERNELS", switch)
        torch.manual_seed(0)
        net = SmallInception(num_classes=4, image_shape=(1, 16, 16), width=0.25).to(memory_format=torch.channels_last)
        images, labels = torch.randn(8, 1, 16, 16), torch.arange(8) % 4
        return top_eigenvalue(lambda: nn.functional.cross_entropy(net(images), labels), list(net.parameters()), 10)

    assert measure("1") == pytest.approx(measure("0"), rel=1e-3)


def test_attention_has_a_second_derivative():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    words = torch.randn(2, 3, 8)
    assert top_eigenvalue(lambda: net(words).square().sum(), list(net.parameters()), 5) > 0


def test_gradient_norms_by_hand():
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with pytest.raises(ValueError, match="net has no gradients"):
        gradient_norms(net)
    net[0].weight.grad, net[0].bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert gradient_norms(net) == {"0": 5.0}
    net[2].weight.grad = torch.tensor([[1e30]])
    assert gradient_norms(net) == pytest.approx({"0": 5.0, "2": 1e30})
    net.append(net[0])  # shared
    assert list(gradient_norms(net)) == ["0", "2"]


def test_zeros_by_hand():
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(relu, nn.Sigmoid(), nn.Sequential(nn.Flatten(), nn.LeakyReLU()), nn.Softmax(dim=1))
    images = torch.tensor([-1.0, -2, 0, 5, 6, 7, 8, 9]).view(2, 1, 2, 2)
    assert activation_sparsity(net, images.clone()) == {"0": 0.375, "1": 0, "2.1": 0}
    assert not relu._forward_hooks
    twice = nn.Sequential(relu, nn.BatchNorm2d(1, affine=False).eval(), relu)
    twice[1].running_mean.fill_(5.5)
    assert activation_sparsity(twice, images) == {"0": (3 + 4) / 16}  # one name for the module
    with pytest.raises(ValueError, match="no activation module that runs"):
        activation_sparsity(nn.Flatten(), images)
    with pytest.raises(ValueError, match="images is empty"):
        activation_sparsity(net, images[:0])


def test_zeros_behind_the_fused_kernels_are_seen(monkeypatch):
    """In training mode a kernel computes convolution, norm and ReLU as one, but not below a hook."""
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv("PROJECT_KERNELS", switch)
        torch.manual_seed(0)
        net = SmallInception(num_classes=4, image_shape=(1, 16, 16), width=0.25).to(memory_format=torch.channels_last)
        with torch.enable_grad():
            found.append(activation_sparsity(net, torch.randn(8, 1, 16, 16)))
    assert len(found[0]) == sum(isinstance(module, nn.ReLU) for module in net.modules())
    assert found[0] == pytest.approx(found[1], abs=1e-3) and min(found[0].values()) > 0.2


def test_the_line_of_a_quadratic():
    start = {"x": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)}
    end = {"x": torch.tensor([3.0, -2.0]), "count": torch.tensor(8)}
    states = []

    def objective_of(state):
        states.append(state)
        return (state["x"] ** 2).sum().item()

    fractions = [-1.0, 0.0, 0.25, 0.5, 1.0, 2.0]
    expected = [(1 + 2 * a) ** 2 + (2 - 4 * a) ** 2 for a in fractions]
    assert interpolate(objective_of, start, end, fractions) == pytest.approx(expected)
    assert [state["count"].item() for state in states] == [3, 3, 3, 8, 8, 8]


def test_the_ends_of_the_line_are_the_checkpoints():
    nets = [conv_net(), conv_net()]
    torch.manual_seed(5)
    images, labels = torch.randn(12, 1, 8, 8).double(), torch.arange(12) % 3
    with torch.no_grad():
        for parameter in nets[1].parameters():
            parameter.add_(torch.randn_like(parameter) / 7)
        nets[1](images)
    first, last = (net.state_dict() for net in nets)
    for name in first:
        assert torch.equal(state_between(first, last, 0)[name], first[name])
        assert torch.equal(state_between(first, last, 1)[name], last[name])
    assert state_between(first, last, 30)["1.running_var"].min() >= 0

    shared = conv_net()
    before = {name: value.clone() for name, value in shared.state_dict().items()}
    found = interpolate(loss_and_accuracy(shared, images, labels), first, last, [0, 0.5, 1])
    for (loss, accuracy), net in zip((found[0], found[2]), nets, strict=True):
        logits = net.eval()(images)
        assert loss == nn.functional.cross_entropy(logits, labels).item()
        assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    of_batch = interpolate(loss_and_accuracy(shared, images, labels, batch_statistics=True), first, last, [1])
    assert of_batch[0][0] == pytest.approx(nn.functional.cross_entropy(nets[1].train()(images), labels).item())
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items()) and shared.training


def test_a_net_that_asks_for_the_version_of_its_weights_is_measured():
    net = Versioned()
    state, images, labels = net.state_dict(), torch.randn(4, 1, 8, 8), torch.arange(4)
    found = interpolate(loss_and_accuracy(net, images, labels), state, state, [0.5])
    assert found[0][0] == pytest.approx(nn.functional.cross_entropy(net.eval()(images), labels).item())


@pytest.mark.parametrize("end", [{"y": torch.zeros(2)}, {"x": torch.zeros(3)}])
def test_two_nets_have_no_line(end):
    with pytest.raises(ValueError, match="start and end are of different nets"):
        interpolate(len, {"x": torch.zeros(2)}, end, [0.5])
