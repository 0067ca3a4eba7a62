import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from project.metrics import latency
from project.metrics.latency import Latency, best, engine, engines, measure

SHAPE = (2, 6, 6)


def make_net() -> nn.Module:
    """In training mode, with running statistics that are not 0 and 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    with torch.no_grad():
        net(3 * torch.randn(32, *SHAPE) + 1)
    return net


def check_engine(name: str) -> None:
    """The engine computes the net's logits at every batch size, and the net is left as it was."""
    net = make_net()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    run = engine(name, net, SHAPE)
    for batch in (1, 3, 64):
        images = torch.randn(batch, *SHAPE)
        logits = run(images)
        assert net.training and net[1].training
        with torch.no_grad():
            expected = net.eval()(images)
        net.train()
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert not logits.requires_grad and type(logits) is Tensor
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert net[0].weight.is_contiguous()


@pytest.mark.parametrize("name", ["eager", "contiguous", "onnxruntime"])
def test_engine_computes_the_logits(name: str) -> None:
    check_engine(name)


@pytest.mark.slow
def test_compiled_engine_computes_the_logits() -> None:
    check_engine("compiled")


def test_each_net_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[int] = []
    compile: Callable[..., Any] = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compilations.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    nets = [nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU()) for width in range(1, 6)]
    runs = [engine("compiled", net, SHAPE) for net in nets]
    for batch in (1, 3):
        images = torch.randn(batch, *SHAPE)
        for net, run in zip(nets, runs, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(run(images), net(images))
    assert len(compilations) == 10  # torch.compile's limit is 8


def test_engine_does_not_follow_the_net() -> None:
    net, images = make_net(), torch.randn(1, *SHAPE)
    run = engine("eager", net, SHAPE)
    before = run(images)
    nn.init.zeros_(net[-1].weight)
    assert torch.equal(run(images), before)


def test_eager_convolves_channels_last_and_contiguous_does_not() -> None:
    layouts: list[bool] = []

    class Spy(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            layouts.append(input.is_contiguous(memory_format=torch.channels_last))
            layouts.append(self.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(input)

    net = nn.Sequential(Spy(2, 4, 3))
    for name in ("eager", "contiguous"):
        engine(name, net, SHAPE)(torch.randn(2, *SHAPE))
    assert layouts == [True, True, False, False]


def test_onnxruntime_is_missed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = latency.importlib.util.find_spec
    monkeypatch.setattr(
        latency.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    assert list(engines(make_net(), SHAPE)) == ["eager", "contiguous", "compiled"]
    assert list(engines(make_net(), SHAPE, ["contiguous"])) == ["contiguous"]
    with pytest.raises(ValueError, match="onnxruntime cannot be imported: pip install"):
        engine("onnxruntime", make_net(), SHAPE)
    with pytest.raises(ValueError, match=r"'tensorrt'.*eager, contiguous, compiled, onnxruntime"):
        engine("tensorrt", make_net(), SHAPE)


def sleeper(duration_ms: float) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        time.sleep(duration_ms / 1000 * len(images))
        return images

    return run


def test_measured_is_the_duration_of_one_call() -> None:
    measured = measure({"slow": sleeper(8), "fast": sleeper(2)}, SHAPE, batch_sizes=(1, 3), rounds=7)
    assert set(measured) == {("slow", 1), ("slow", 3), ("fast", 1), ("fast", 3)}
    for (name, batch), found in measured.items():
        expected = {"slow": 8, "fast": 2}[name] * batch
        assert expected <= found.p05_ms <= found.median_ms <= found.p95_ms
        assert found.p05_ms < 1.8 * expected + 1  # one call, not two
        assert found.num_rounds == 7 and found.num_threads == torch.get_num_threads()
    assert best(measured) == {1: "fast", 3: "fast"}


def test_rounds_interleave_all_engines_in_changing_order() -> None:
    calls: list[tuple[str, int]] = []

    def spy(name: str) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            assert images.shape[1:] == SHAPE and images.dtype == torch.float32 and images.is_contiguous()
            calls.append((name, len(images)))
            return images

        return run

    random_state = torch.get_rng_state()
    measure({name: spy(name) for name in "abc"}, SHAPE, batch_sizes=(1, 2), rounds=10, warm_up=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    warm_up, rounds = calls[: 2 * 6], calls[2 * 6 :]
    everyone = {(name, batch) for name in "abc" for batch in (1, 2)}
    assert set(warm_up) == everyone
    assert rounds[::2] == rounds[1::2]  # an untimed call of the same engine and size before each timed one
    orders = [tuple(rounds[start : start + 12 : 2]) for start in range(0, 120, 12)]
    assert all(set(order) == everyone for order in orders)
    assert len(set(orders)) > 5


def test_budget_ends_the_rounds_but_for_the_first() -> None:
    engines = {"a": sleeper(5)}
    assert measure(engines, SHAPE, batch_sizes=(1,), rounds=9, budget_s=0.0, warm_up=1)["a", 1].num_rounds == 1
    assert 1 < measure(engines, SHAPE, batch_sizes=(1,), rounds=500, budget_s=0.2)["a", 1].num_rounds < 100


def test_percentiles_equal_the_hand_calculation() -> None:
    found = Latency.of([float(value) for value in reversed(range(101))])
    assert (found.median_ms, found.p05_ms, found.p95_ms, found.num_rounds) == pytest.approx((50, 5, 95, 101))
    assert Latency.of([1.0, 2.0]).median_ms == 1.5


def test_best_is_taken_for_each_batch_size() -> None:
    def found(median_ms: float) -> Latency:
        return Latency(median_ms, 0.1, 99, 5, 1)

    latencies = {("a", 1): found(1), ("b", 1): found(2), ("a", 64): found(30), ("b", 64): found(20)}
    assert best(latencies) == {1: "a", 64: "b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"warm_up": 0}, "warm_up is 0"),
        ({"batch_sizes": (1, 0)}, "batch size 0 is 0"),
        ({"batch_sizes": ()}, "nothing to measure"),
    ],
)
def test_nothing_to_measure_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure({"a": sleeper(0)}, SHAPE, **options)
