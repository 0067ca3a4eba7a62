"""A first layer without its map against torch's operations in float64: values, gradients, running statistics."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from project.models.kernels import first_layer
from project.models.layers import ConvNormAct, MaxPool

pytestmark = pytest.mark.usefixtures("kernels")
SHAPES = [(5, 1, 8, 8), (3, 1, 7, 9), (17, 3, 6, 11), (2, 2, 5, 2), (9, 1, 1, 3), (1, 3, 13, 1)]
POOLS: list[Callable[[], nn.Module] | None] = [None, lambda: MaxPool(2, ceil_mode=True), lambda: MaxPool(2)]


def make_layer(
    in_channels: int, channels: int, pool: Callable[[], nn.Module] | None = lambda: MaxPool(2, ceil_mode=True)
) -> ConvNormAct:
    layer = ConvNormAct(in_channels, channels, 3, pool=pool).to(memory_format=torch.channels_last)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    return layer


def run(layer: ConvNormAct, images: Tensor) -> Tensor | None:
    return first_layer(images, layer.conv, layer.norm, layer.act, getattr(layer, "pool", None))


def error(given: Tensor | None, exact: Tensor | None) -> float:
    """Of the norm, relative: of two pixels that are nearly equal either may win a window, in one value of many."""
    assert given is not None and exact is not None
    return float((given.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-12))


def check(layer: ConvNormAct, images: Tensor, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    exact_layer = deepcopy(layer).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = run(layer, images)
    exact = exact_layer(images.double())
    assert y is not None and y.dtype == dtype and y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    count, channels, *sides = y.shape
    grad = torch.randn(count, channels + 16, *sides).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = grad[:, 8:-8]  # as behind a concatenation: rows lie apart
    y.backward(grad)
    exact.backward(grad.double())
    assert error(y, exact) < (2**-8 if dtype == torch.bfloat16 else tolerance)
    for given, wanted in zip(layer.parameters(), exact_layer.parameters(), strict=True):
        assert error(given.grad, wanted.grad) < tolerance
    assert error(layer.norm.running_mean, exact_layer.norm.running_mean) < tolerance
    assert error(layer.norm.running_var, exact_layer.norm.running_var) < tolerance
    assert layer.norm.num_batches_tracked == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("channels", [8, 32, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_four_operations(
    shape: tuple[int, ...], pool: Callable[[], nn.Module] | None, channels: int, dtype: torch.dtype
) -> None:
    if pool is POOLS[2] and min(shape[2:]) < 2:
        pytest.skip("torch refuses an empty map")
    torch.manual_seed(0)
    check(make_layer(shape[1], channels, pool), torch.randn(shape), dtype)


@pytest.mark.parametrize("layout", ["channels-last", "slice", "expanded"])
def test_images_may_lie_anyhow(layout: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 6, 12, 9)
    if layout == "channels-last":
        images = images[:, :3].contiguous(memory_format=torch.channels_last)
    elif layout == "slice":
        images = images[:, ::2, 1::2]
    else:
        images = images[:, :1].expand(-1, 3, -1, -1)
    check(make_layer(3, 16), images, tolerance=1e-4)


@pytest.mark.parametrize(("mean", "tolerance"), [(20, 1e-5), (1e4, 1e-3)])
def test_a_large_mean_costs_few_digits(mean: float, tolerance: float) -> None:
    """Few, as the black border is far from it: a share of the variance that the sums have to bear."""
    torch.manual_seed(0)
    check(make_layer(1, 16), torch.randn(16, 1, 12, 12) + mean, tolerance=tolerance)


def test_smooth_images_and_a_filter_that_sees_edges() -> None:
    """The variance is the small difference of large products of neighbours."""
    layer = make_layer(1, 8)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.tensor([0.0, 0, 0, 1, -2, 1, 0, 0, 0]).view(1, 1, 3, 3))
    line = torch.linspace(0, 6, 32).sin().expand(32, 32)
    line = line * torch.linspace(0, 3, 32).sin()[:, None]
    check(layer, line.expand(8, 1, 32, 32) * torch.rand(8, 1, 1, 1), tolerance=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_images(value: float) -> None:
    torch.manual_seed(0)
    check(make_layer(1, 16), torch.full((4, 1, 9, 9), value), tolerance=1e-4)


def test_weights_of_zeros_get_their_gradient() -> None:
    """Pruned weights grow back by it."""
    torch.manual_seed(0)
    layer = make_layer(1, 16)
    with torch.no_grad():
        layer.conv.weight[::2] = 0
        layer.conv.weight[1::2, :, 1:] = 0
        layer.norm.weight[3] = 0
        layer.norm.bias.abs_()
    check(layer, torch.rand(6, 1, 9, 9))
    assert layer.conv.weight.grad[::2].abs().min() > 0


def test_of_equal_pixels_the_first_wins() -> None:
    """Images of squares of one colour, within which all windows are equal."""
    torch.manual_seed(0)
    images = torch.rand(16, 1, 3, 3).repeat_interleave(6, dim=2).repeat_interleave(6, dim=3)
    check(make_layer(1, 8, lambda: MaxPool(2)), images)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    images, layer = torch.rand(37, 3, 9, 9), make_layer(3, 24)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        y = run(layer, images)
        assert y is not None
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("what", ["image", "infinite image", "weight", "gamma", "beta"])
def test_nan_goes_through(what: str) -> None:
    torch.manual_seed(0)
    images, layer = torch.randn(4, 1, 5, 5), make_layer(1, 16)
    with torch.no_grad():
        if "image" in what:
            images[1, 0, 2, 3] = torch.inf if what == "infinite image" else torch.nan
        elif what == "weight":
            layer.conv.weight[3, 0, 1, 1] = torch.nan
        else:
            (layer.norm.weight if what == "gamma" else layer.norm.bias)[3] = torch.nan
    exact_layer = deepcopy(layer).double()
    y, exact = run(layer, images), exact_layer(images.double())
    assert y is not None and exact.isnan().any()
    assert torch.equal(y.isnan(), exact.isnan())
    y.sum().backward()
    exact.sum().backward()
    for given, wanted in zip(layer.parameters(), exact_layer.parameters(), strict=True):
        assert torch.equal(given.grad.isnan(), wanted.grad.isnan())


def test_a_layer_trains_the_same_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fused = make_layer(1, 16)
    plain = deepcopy(fused)
    images = torch.randn(8, 1, 9, 9)
    y = fused(images)
    assert "_FirstLayer" in type(y.grad_fn).__name__
    y.square().sum().backward()
    monkeypatch.setattr("project.models.kernels.first_layer", lambda *_: None)
    expected = plain(images)
    assert "_FirstLayer" not in type(expected.grad_fn).__name__
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for one, two in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-3)


def test_what_it_leaves_to_torch() -> None:
    images = torch.randn(4, 1, 6, 6)

    def taken(images: Tensor = images, **changes: nn.Module | None) -> bool:
        layer = make_layer(images.shape[1], 8)
        parts = {"conv": layer.conv, "norm": layer.norm, "activation": layer.act, "pool": layer.pool} | changes
        return first_layer(images, **parts) is not None

    def listened(module: nn.Module) -> nn.Module:
        module.register_forward_hook(lambda *_: None)
        return module

    def conv(
        in_channels: int = 1, channels: int = 8, side: int = 3, bias: bool = False, **options: object
    ) -> nn.Module:
        return nn.Conv2d(in_channels, channels, side, bias=bias, **({"padding": 1} | options))

    class OtherConv(nn.Conv2d):
        """A convolution of its own."""

    assert taken() and taken(pool=None) and taken(conv=conv())
    for other in (
        conv(bias=True),
        conv(stride=2),
        conv(padding=0),
        conv(padding="same"),
        conv(padding_mode="circular"),
        conv(side=5, padding=2),
        conv(dilation=2, padding=2),
        conv(channels=12),
        conv().double(),
        listened(conv()),
        parametrizations.weight_norm(conv()),
        OtherConv(1, 8, 3, padding=1, bias=False),
        nn.Identity(),
    ):
        assert not taken(conv=other), other
    for other in (nn.BatchNorm2d(8).eval(), nn.GroupNorm(2, 8), listened(nn.BatchNorm2d(8))):
        assert not taken(norm=other), other
    for other in (nn.SiLU(), listened(nn.ReLU())):
        assert not taken(activation=other), other
    for other in (nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 1), nn.AvgPool2d(2), listened(nn.MaxPool2d(2))):
        assert not taken(pool=other), other
    assert not taken(images.clone().requires_grad_())
    assert not taken(images.double()) and not taken(images[0])
    assert not taken(torch.randn(2, 4, 6, 6))
    assert not taken(images[:0])
    with torch.no_grad():
        assert not taken()
    with torch.autocast("cpu", torch.float16):
        assert not taken()
    with pytest.raises(RuntimeError, match="too small"):
        make_layer(1, 8, lambda: MaxPool(2))(torch.randn(2, 1, 1, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ConvNormAct(1, 8, 3)(torch.randn(1, 1, 1, 1))
