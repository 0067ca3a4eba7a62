"""Signs of inputs: the paper's equations in float64, the gradient, the surgery, what a bit-counting kernel could do."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.nets import NETS, build, images_for
from torch import Tensor, nn

from project.compression import plan_thinning, to_plain
from project.compression.low_bit.ternary import LowBitWeights, binary_weight
from project.compression.low_bit.xnor import BinarizeInputs, BinaryInput, binary_sign, count_sign_macs
from project.compression.thinning.units import look_at_units, masked_net
from project.deployment.export import export
from project.deployment.model_file import Metadata
from project.metrics.complexity import complexity_by_layer, count_macs
from project.models.surgery import replay_

NET = "SmallInception-8"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers_of(net: nn.Module) -> list[str]:
    """All but the first and the last."""
    return [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)][1:-1]


def binarized(name: str = NET) -> tuple[nn.Module, nn.Module]:
    """A net, and the same with binary weights and inputs, whose norms know some images."""
    dense = build(name).eval()
    net = deepcopy(dense).train()
    names = layers_of(net)
    BinarizeInputs(names, input_scale=True).apply_(net)
    for _ in range(3):
        net(images_for(name))
    state = net.state_dict()
    LowBitWeights("bwn", [f"{layer}.layer" for layer in names]).write_(state)
    net.load_state_dict(state)
    return dense, net.eval()


def reference(
    z: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int], scaled: bool
) -> Tensor:
    """Eq. 11 window by window: of ``[N, C, H, W]`` and ``[O, C, h, w]``; zeros beside the image are no signs."""
    num, channels, height, width = z.shape
    sides, (rows, columns) = weight.shape[2:], padding
    signs = torch.zeros(num, channels, height + 2 * rows, width + 2 * columns, dtype=z.dtype)
    size = torch.zeros_like(signs)
    inner = (..., slice(rows, rows + height), slice(columns, columns + width))
    signs[inner], size[inner] = torch.where(z >= 0, 1.0, -1.0).double(), z.abs()
    found = []
    for top in range(0, signs.shape[2] - sides[0] + 1, stride[0]):
        for left in range(0, signs.shape[3] - sides[1] + 1, stride[1]):
            window = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
            k = size[window].mean(dim=(1, 2, 3)) if scaled else 1  # beta of section 3.2: the mean of |X| in the window
            for filter_, shift in zip(weight, bias, strict=True):
                alpha = filter_.abs().mean()
                products = signs[window] * torch.where(filter_ >= 0, 1.0, -1.0)
                found.append(products.sum(dim=(1, 2, 3)) * k * alpha + shift)
    shape = [(z.shape[2 + i] + 2 * padding[i] - sides[i]) // stride[i] + 1 for i in range(2)]
    return torch.stack(found).view(*shape, len(weight), num).permute(3, 2, 0, 1)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 1)])
def test_the_value_is_that_of_equation_11(kernel: tuple[int, int], scaled: bool) -> None:
    stride, padding = (2, 1), (kernel[0] // 2, kernel[1] // 2)
    conv = nn.Conv2d(5, 4, kernel, stride, padding).double()
    conv.weight.data, conv.bias.data = numbers(*conv.weight.shape), numbers(4, seed=1)  # type: ignore[union-attr]
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()  # type: ignore[union-attr]
    module = BinaryInput(conv, scaled).double()
    low_bit = LowBitWeights("bwn", ["layer"])
    low_bit.attach_(module)
    x = numbers(2, 5, 7, 6, seed=2).relu()  # what a layer of these nets reads
    z = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    wanted = reference(z, weight, bias, stride, padding, scaled)
    torch.testing.assert_close(module(x), wanted, rtol=1e-12, atol=1e-12)


def test_of_a_linear_layer_the_window_is_all_inputs() -> None:
    linear = nn.Linear(6, 3).double()
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    module = BinaryInput(linear, input_scale=True).double().eval()
    z = numbers(4, 6)
    z[0, 0] = 0
    wanted = torch.where(z >= 0, 1.0, -1.0).double() @ weight.T * z.abs().mean(1, keepdim=True) + bias
    found = module(z * (1 + 1e-5) ** 0.5)  # the fresh norm's statistics are 0 and 1
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sign_is_one_or_minus_one_and_its_gradient_clipped(dtype: torch.dtype) -> None:
    x = torch.tensor([-2.0, -1.0, -0.25, -0.0, 0.0, 0.25, 1.0, 1.0625], dtype=dtype, requires_grad=True)
    signs = binary_sign(x)
    assert signs.dtype == dtype and signs.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    factors = torch.arange(1.0, 9).to(dtype)
    (signs * factors).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]


def test_the_gradient_takes_the_scale_for_a_constant() -> None:
    """Of ``y_o = k sum_i W_oi s_i``, ``k = mean |z|``: through the signs, where they let it."""
    linear = nn.Linear(6, 3, bias=False).double()
    module = BinaryInput(linear, input_scale=True).eval()
    module.norm = nn.Identity()
    z, g = numbers(4, 6, seed=3).mul(1.5).requires_grad_(), numbers(4, 3, seed=4)
    module(z).backward(g)
    w, s, k = linear.weight.detach(), z.detach().sign(), z.detach().abs().mean(1, keepdim=True)
    inside = z.detach().abs() <= 1
    assert 0.2 < float(inside.double().mean()) < 0.8
    torch.testing.assert_close(z.grad, inside * k * (g @ w), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear.weight.grad, (g * k).T @ s, rtol=1e-12, atol=1e-12)


def test_behind_a_relu_the_norm_is_what_makes_signs_tell_anything() -> None:
    net = build(NET)
    names = layers_of(net)
    BinarizeInputs(names).apply_(net)
    shares: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            positive = (args[0] >= 0).float().mean()
            inner = (module.norm(args[0]) >= 0).float().mean()  # type: ignore[operator]
            shares[name] = (float(positive), float(inner))

        return note

    for name in names:
        net.get_submodule(name).register_forward_pre_hook(watch(name))
    net.train()(images_for(NET))
    assert len(shares) == len(names)
    assert all(before == 1 and 0.1 < after < 0.9 for before, after in shares.values())


def test_signs_are_counted_as_what_they_are() -> None:
    """They run as multiplications, so the whole count stays; all but stem and head could be bits."""
    dense, net = binarized()
    shape = NETS[NET][1]
    rows = [row.macs for row in complexity_by_layer(dense, shape) if row.macs]
    assert count_macs(net, shape) == count_macs(dense, shape) == sum(rows)
    assert count_sign_macs(net, shape) == sum(rows[1:-1]) > 0.8 * sum(rows)
    assert count_sign_macs(dense, shape) == 0


def test_the_surgery_is_replayed_from_plain_values_and_keeps_the_weights() -> None:
    dense, net = binarized()
    fresh = build(NET, seed=1)
    replay_(fresh, [to_plain(BinarizeInputs(layers_of(dense), input_scale=True))])
    assert list(fresh.state_dict()) == list(net.state_dict())
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images_for(NET)), net(images_for(NET)))
    for name in layers_of(dense):
        weight = net.get_parameter(f"{name}.layer.weight")
        torch.testing.assert_close(weight, binary_weight(dense.get_parameter(f"{name}.weight")))


def test_a_surgery_that_does_not_fit_leaves_the_net_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1, padding=1))
    before = repr(net)
    for layers, sentence in (
        (["0", "fc"], "no plain convolution or linear layer fc"),
        (["0", "1"], "inputs of 1 have no scale K.*of one group.*exclude it"),
        (["0", "2"], "more than half of the kernel"),
    ):
        with pytest.raises(ValueError, match=sentence):
            BinarizeInputs(layers, input_scale=True).apply_(net)
        assert repr(net) == before
    BinarizeInputs(["0"]).apply_(net)
    for name in ("0", "0.layer"):
        with pytest.raises(ValueError, match="and once"):
            BinarizeInputs([name]).apply_(net)


@torch.no_grad()
def test_units_that_become_signs_are_thinned_as_the_masked_net_has_them() -> None:
    """The scales of the inputs and of the weights are means over the channels that stay."""
    _, net = binarized()
    shape = NETS[NET][1]
    units, reasons = look_at_units(net, shape)
    assert reasons.keys() == {"fc"}
    removed = {layer: of.outputs(range(0, of.num - 1, 2)) for layer, of in units.items()}
    masked, thinned = masked_net(net, removed, shape).double().eval(), deepcopy(net).double().eval()
    plan_thinning(net, removed, shape).apply_(thinned)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(5)).double()
    expected = masked(images)
    assert (thinned(images) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmallInception-28", "LeNet5-28x19"])
def test_onnx_runtime_gives_the_same_signs(name: str, tmp_path: Path) -> None:
    _, net = binarized(name)
    images = torch.randn(64, *NETS[name][1], generator=torch.Generator().manual_seed(5))
    metadata = Metadata(tuple("abcde"), NETS[name][1], (0.5,) * NETS[name][1][0], (0.5,) * NETS[name][1][0])
    done = export(net, tmp_path / "model.onnx", metadata, images)
    assert done.difference < 0.05 and done.agreement > 0.98  # a sign may flip
