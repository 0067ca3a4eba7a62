"""Binary and ternary weights: the papers' formulas, their optimality, their gradients; freezing."""

import pytest
import torch
from helpers.subclasses import Mixed, fast_path
from torch import Tensor, nn

from project.compression.low_bit.ternary import (
    Freezing,
    LowBitWeights,
    binary_weight,
    ternary_weight,
    trained_ternary_weight,
)
from project.losses.penalties import weights_by_kind


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(weight: Tensor, rounded: Tensor) -> float:
    return float((weight - rounded).square().sum())


def test_binary_weights_are_the_nearest_of_their_kind_per_filter() -> None:
    """XNOR-Net, eq. 4 to 6: no other signs and no other scale of a filter come nearer."""
    weight = weights(4, 2, 2, 2)
    rounded = binary_weight(weight)
    for filter_, found in zip(weight.flatten(1), rounded.flatten(1), strict=True):
        assert len(found.abs().unique()) == 1
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
        scales = (signs @ filter_) / 8  # the best scale of each pattern, by least squares
        best = (filter_ - scales[:, None] * signs).square().sum(1).min()
        assert error(filter_, found) == pytest.approx(float(best), rel=1e-12)


def test_zero_is_binary_too() -> None:
    assert binary_weight(torch.tensor([[0.0, -2.0, 1.0]])).tolist() == [[1.0, -1.0, 1.0]]


def test_ternary_weights_follow_the_paper_by_hand() -> None:
    """E|w| = 0.5, so that the threshold is 0.375 and the scale the mean of 0.5, 1.0 and 0.4."""
    rounded = ternary_weight(torch.tensor([[0.5, -1.0], [0.1, 0.4]], dtype=torch.float64))
    wanted = torch.tensor([[1.9, -1.9], [0.0, 1.9]], dtype=torch.float64) / 3
    assert torch.allclose(rounded, wanted, rtol=1e-12)


def test_the_ternary_scale_is_the_best_for_its_zeros_and_the_threshold_near_the_best() -> None:
    weight = weights(64, 32)
    rounded = ternary_weight(weight)
    assert len(rounded.unique()) == 3
    for factor in (0.99, 1.01):
        assert error(weight, rounded) < error(weight, rounded * factor)
    large = weight.abs().flatten().sort(descending=True).values
    best = max((large.cumsum(0) ** 2 / torch.arange(1, len(large) + 1)).tolist())  # eq. 5, over all thresholds
    assert error(weight, rounded) <= (float(weight.square().sum()) - best) * 1.01


@pytest.mark.parametrize("method", [binary_weight, ternary_weight])
def test_the_gradient_goes_straight_through(method: object) -> None:
    weight = weights(3, 5).requires_grad_()
    factors = weights(3, 5, seed=1)
    (method(weight) * factors).sum().backward()  # type: ignore[operator]
    assert weight.grad is not None and torch.equal(weight.grad, factors)


def test_trained_values_and_weights_learn_by_the_papers_equations() -> None:
    """TTQ, eq. 7 and 8, written out weight by weight."""
    weight = torch.tensor([1.0, 0.5, 0.01, -0.02, -0.2, -0.9], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([0.7, 0.3], dtype=torch.float64, requires_grad=True)
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    rounded = trained_ternary_weight(weight, values)
    assert rounded.tolist() == [0.7, 0.7, 0.0, 0.0, -0.3, -0.3]
    rounded.backward(gradient)
    assert values.grad is not None and values.grad.tolist() == [1.0 + 2.0, -(5.0 + 6.0)]
    assert weight.grad is not None
    assert weight.grad.tolist() == pytest.approx([0.7, 1.4, 3.0, 4.0, 1.5, 1.8])


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(96, 5))


@pytest.mark.parametrize("method", ["bwn", "twn", "ttq"])
def test_an_attached_net_computes_what_the_written_one_does(method: str) -> None:
    net, images = make_net(), torch.randn(2, 1, 8, 8)
    before = net(images)
    low_bit = LowBitWeights(method, ["1", "3"])  # type: ignore[arg-type]
    keys = list(net.state_dict())
    low_bit.attach_(net)
    low_bit.attach_(net)
    attached = net(images)
    assert list(net.state_dict()) == keys
    low_bit.detach_()
    assert torch.equal(net(images), before)
    written = {name: value.clone() for name, value in net.state_dict().items()}
    low_bit.write_(written)
    net.load_state_dict(written)
    assert torch.equal(net(images), attached) and not torch.equal(attached, before)
    assert len(written["1.weight"].abs().unique()) <= (6 if method == "bwn" else 3)


def test_freezing_takes_the_largest_first_and_holds_them() -> None:
    net = make_net()
    freezing = Freezing(LowBitWeights("twn", ["3"]))
    weight = net[3].weight
    start = weight.detach().clone()
    scale = float(ternary_weight(start).abs().max())
    previous = torch.zeros_like(start, dtype=torch.bool)
    for portion in (0.5, 0.75, 1.0):
        freezing.freeze_(net, portion)
        frozen = freezing.frozen["3"]
        assert int(frozen.sum()) == round(portion * start.numel()) and bool((frozen >= previous).all())
        held = weight.detach().clone()
        with torch.no_grad():
            weight += torch.randn_like(weight)
        freezing.hold_(net)
        assert torch.equal(weight[frozen], held[frozen])
        assert portion == 1 or not torch.equal(weight[~frozen], held[~frozen])
        if portion == 0.5:
            assert start.abs()[frozen].min() >= start.abs()[~frozen].max()
        previous = frozen
    assert sorted(weight.detach().unique().tolist()) == pytest.approx([-scale, 0.0, scale])


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="method is 'four'"):
        LowBitWeights("four", ["0"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer is left"):
        LowBitWeights("twn", [])
    with pytest.raises(ValueError, match="method is ttq"):
        Freezing(LowBitWeights("ttq", ["0"]))


@pytest.mark.parametrize("method", ["bwn", "twn", "ttq"])
def test_subclasses_and_layers_that_are_not_called_compute_what_is_written(method: str) -> None:
    torch.manual_seed(0)
    net, images = Mixed().eval(), torch.randn(4, 3, 8, 8)
    assert fast_path(net)
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    low_bit = LowBitWeights(method, names)  # type: ignore[arg-type]
    with torch.no_grad():
        before = net(images)
        low_bit.attach_(net)
        attached = net(images)
        low_bit.detach_()
        assert torch.equal(net(images), before)
        written = {name: value.clone() for name, value in net.state_dict().items()}
        low_bit.write_(written)
        net.load_state_dict(written)
        assert (net(images) - attached).abs().max() <= 1e-5 * attached.abs().max()
        assert (before - attached).abs().max() > 0.1 * attached.abs().max()


def test_a_rounded_subclass_trains_and_its_weight_is_seen_by_penalties_and_bounds() -> None:
    torch.manual_seed(0)
    net = Mixed().train()
    low_bit = LowBitWeights("twn", ["standard", "reader.layer", "encoder.self_attn.out_proj", "hidden"])
    low_bit.attach_(net)
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    for name in low_bit.layers:
        weight = dict(net.named_parameters())[f"{name}.weight"]
        assert weight.grad is not None and weight.grad.abs().sum() > 0
    conv, linear = weights_by_kind(net)
    assert any(weight is net._modules["standard"]._parameters["weight"] for weight in conv)  # type: ignore
    assert all(isinstance(weight, nn.Parameter) for weight in conv + linear)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_net_rounds_while_it_is_attached() -> None:
    """Also if it was compiled before, as at a ``begin_epoch`` above 0."""
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 3, 2, 2)
    net.compile(backend="eager")
    low_bit = LowBitWeights("twn", ["1", "3"])
    try:
        plain = net(images)
        for _ in range(2):
            low_bit.attach_(net)
            rounded = net(images)
            assert torch.equal(rounded, net.forward(images)) and not torch.allclose(rounded, plain, atol=1e-2)
            rounded.sum().backward()
            assert net[1]._parameters["weight"].grad.abs().sum() > 0
            low_bit.detach_()
            assert torch.equal(net(images), plain)
    finally:
        torch.compiler.reset()
