"""Winograd's algorithm against direct convolution in float64: formulas, and layers in every state."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from project.compression import WinogradConv2d
from project.compression.winograd.choice import ERROR_LIMITS
from project.compression.winograd.convolution import (
    MATRICES,
    TILES,
    count_multiplications,
    transform_weight,
    why_not_winograd,
    winograd_conv2d,
)
from project.metrics.complexity import count_macs


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def uses_kernel(layer: nn.Module, x: Tensor) -> bool:
    with torch.inference_mode(), Calls() as calls:
        layer(x)
    return calls.names["winograd"] > 0


def layer_of(channels: int, out_channels: int, tile: int, bias: bool = True, padding: object = 1) -> WinogradConv2d:
    conv = nn.Conv2d(channels, out_channels, 3, padding=padding, bias=bias).to(memory_format=torch.channels_last)
    return WinogradConv2d.of(conv, tile).eval()


def map_of(*shape: int) -> Tensor:
    return torch.randn(shape).relu_().contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def assert_right(layer: WinogradConv2d, x: Tensor) -> None:
    """Within the bars, of what the layer's weight says now; of one channel a half above, where direct convolution of
    nine products has next to no error.
    """
    bias = None if layer.bias is None else layer.bias.double()
    exact = functional.conv2d(x.double(), layer.weight.double(), bias, padding=layer.padding)
    direct = functional.conv2d(x, layer.weight, layer.bias, padding=layer.padding)
    y = layer(x)
    assert (y.shape, y.stride()) == (direct.shape, direct.stride())
    unit = max((direct - exact).norm(), torch.finfo(torch.float32).eps / 4 * exact.norm())
    assert (y - exact).norm() <= ERROR_LIMITS[layer.tile] * unit * (1.5 if x.shape[1] == 1 else 1)


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
def test_the_matrices_filter_exactly(tile):
    """F(m, 3) in one dimension (eq. 6): outputs of a sliding dot product, for whole numbers to the last bit."""
    inputs, weights, outputs = (torch.tensor(matrix, dtype=torch.float64) for matrix in MATRICES[tile])
    d, g = torch.arange(tile + 2).double() ** 2 - 7, torch.tensor([24.0, -48, 72]).double()
    y = outputs @ ((weights @ g) * (inputs @ d))
    assert y.tolist() == [float(d[i : i + 3] @ g) for i in range(tile)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (0, 2)])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (8, 8), (3, 17), (14, 6), (57, 11)])
def test_in_float64_it_is_convolution(tile, padding, height, width):
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, height, width), (4, 3, 3, 3), (4,)))
    for own in (bias, None):
        y = winograd_conv2d(x, weight, own, padding, tile)
        torch.testing.assert_close(y, functional.conv2d(x, weight, own, padding=padding), rtol=0, atol=1e-12)


def test_a_transformed_weight_is_rounded_once():
    weight = torch.randn(5, 4, 3, 3)
    for tile in TILES:
        exact = transform_weight(weight.double(), tile)
        assert torch.equal(transform_weight(weight, tile), exact.float()) and exact.shape == (tile + 2, tile + 2, 4, 5)


@pytest.mark.parametrize(("side", "tile", "saved"), [(16, 4, 4), (16, 2, 2.25), (14, 4, 49 / 16), (7, 2, 441 / 256)])
def test_ragged_tiles_cost_as_much_as_whole_ones(side, tile, saved):
    direct = count_multiplications(side, side, 3, 5, None)
    assert direct == side**2 * 9 * 15
    assert direct / count_multiplications(side, side, 3, 5, tile) == saved


@pytest.mark.usefixtures("kernels")
def test_what_is_counted_is_what_the_matrix_products_take():
    for tile in TILES:
        for height, width, padding in [(8, 8, 1), (7, 13, 0), (9, 6, 2)]:
            net = layer_of(6, 5, tile, padding=padding)
            sides = height + 2 * padding - 2, width + 2 * padding - 2
            assert count_macs(net, (6, height, width)) == count_multiplications(*sides, 6, 5, tile)
            net.train()  # counted as it runs then, which is in eval mode
            assert count_macs(net, (6, height, width), batch=3) == 3 * count_multiplications(*sides, 6, 5, tile)


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2, (2, 0), "same", "valid"])
def test_sizes_channels_and_padding(tile, bias, padding):
    torch.manual_seed(0)
    sides = [(side, side) for side in range(5, 58, 4)] + [(3, 40), (31, 6), (57, 9), (4, 4), (10, 13)]
    for number, (height, width) in enumerate(sides):
        channels, out_channels = [(1, 8), (3, 20), (16, 16), (24, 33), (40, 64), (7, 95)][number % 6]
        assert_right(
            layer_of(channels, out_channels, tile, bias, padding), map_of(1 + number % 3, channels, height, width)
        )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tile", TILES)
def test_a_changed_weight_is_seen(tile):
    torch.manual_seed(0)
    layer, x = layer_of(8, 24, tile), map_of(2, 8, 9, 9)

    def optimize() -> None:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        layer.train()(x).square().sum().backward()
        optimizer.step()
        layer.eval()

    def there_and_back() -> None:
        layer.to(torch.float64).weight.data *= 1.5
        assert not uses_kernel(layer, x.double())
        layer.to(torch.float32)

    def load(assign: bool) -> None:
        state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
        layer.load_state_dict(state, assign=assign)

    changes: list[Callable[[], object]] = [
        lambda: None,
        optimize,
        partial(load, assign=False),
        partial(load, assign=True),
        there_and_back,
        lambda: layer.weight.data.mul_(-0.5),  # leaves no trace in the version of the parameter
        lambda: layer.weight.data.numpy().fill(0.25),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(24, 8, 3, 3))),
        lambda: layer.weight.data.__setitem__((3, 2, 1, 0), 5.0),
        lambda: layer.to(memory_format=torch.channels_last),
        lambda: torch.inference_mode()(layer.weight.mul_)(3.0),
        lambda: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        lambda: layer.parametrizations.weight.original.data.neg_(),
    ]
    for change in changes:
        change()
        assert uses_kernel(layer, x)
        assert_right(layer, x)


@pytest.mark.usefixtures("kernels")
def test_copies_change_alone():
    layer, x = layer_of(8, 16, 4), map_of(1, 8, 6, 6)
    with torch.inference_mode():
        before = layer(x)
    copy = deepcopy(layer)
    copy.weight.data *= 2
    assert_right(copy, x)
    with torch.inference_mode():
        assert torch.equal(layer(x), before)


@pytest.mark.usefixtures("kernels")
def test_gradients_are_those_of_plain_convolution():
    torch.manual_seed(0)
    layer, x = layer_of(4, 8, 4), map_of(2, 4, 7, 6)
    plain = nn.Conv2d(4, 8, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    for training in (True, False):
        grads = []
        for module in (layer.train(training), plain):
            own = x.clone().requires_grad_()
            module.zero_grad()
            module(own).square().sum().backward()
            grads.append([own.grad, module.weight.grad, module.bias.grad])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
    assert uses_kernel(layer, x)  # in eval mode
    layer.weight.requires_grad_(False)
    own = x.clone().requires_grad_()
    layer(own).sum().backward()  # nothing but the input needs a gradient
    assert own.grad is not None and bool(own.grad.any())


@pytest.mark.usefixtures("kernels")
def test_where_there_is_no_kernel_it_is_plain_convolution():
    layer, x = layer_of(4, 8, 4), map_of(2, 4, 7, 6)
    assert uses_kernel(layer, x) and uses_kernel(layer, x.contiguous())
    with torch.inference_mode():
        for other in (x.double(), x.bfloat16()):
            plain = deepcopy(layer).to(other.dtype)
            expected = functional.conv2d(other, plain.weight, plain.bias, padding=1)
            assert not uses_kernel(plain, other) and torch.equal(plain(other), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x[:0]).shape == (0, 8, 7, 6)
        with pytest.raises(RuntimeError, match="channels"):
            layer(map_of(2, 5, 7, 6))
        with pytest.raises(RuntimeError):
            layer_of(4, 8, 4, padding=0)(x[..., :2])
        contiguous = deepcopy(layer).to(memory_format=torch.contiguous_format)
        assert contiguous(x.contiguous()).is_contiguous() and not uses_kernel(contiguous, x.contiguous())
        assert layer.to("meta")(x.to("meta")).shape == (2, 8, 7, 6)


def test_a_compiler_gets_the_plain_convolution():
    layer, x = layer_of(4, 8, 4), map_of(2, 4, 7, 6)
    with torch.inference_mode():
        expected = functional.conv2d(x, layer.weight, layer.bias, padding=1)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
    graph = torch.export.export(layer, (x,)).graph_module.graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert names == ["aten.conv2d.default"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 1, "padding": 0}, "kernel is 1x1"),
        ({"kernel_size": (3, 1)}, "kernel is 3x1"),
        ({"stride": 2}, "stride or a dilation"),
        ({"dilation": 2}, "stride or a dilation"),
        ({"groups": 2}, "2 groups"),
        ({"padding_mode": "reflect"}, "padding is reflect"),
        ({"padding_mode": "circular"}, "padding is circular"),
    ],
)
def test_what_has_no_winograd_form_is_refused_with_the_reason(options, reason):
    conv = nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, **options})
    assert reason in (why_not_winograd(conv) or "")
    with pytest.raises(ValueError, match=f"no Winograd form: .*{reason}"):
        WinogradConv2d.of(conv, 4)
    with pytest.raises(ValueError, match=r"tile is 3, but there are .* choose 2 or 4"):
        WinogradConv2d.of(nn.Conv2d(1, 1, 3), 3)
