"""The packed tensors: every net to the same bits, in as few bytes as the entropy of its values."""

import sys
import time

import numpy as np
import pytest
import torch
from helpers.nets import NETS, build, masked_and_thinned
from torch import Tensor, nn

from project.compression.low_bit.ternary import LowBitWeights, Method
from project.deployment.packed.packing import Packed, PackedTensors, pack
from project.models import SmallInception

State = dict[str, Tensor]


def there_and_back(state: State) -> tuple[int, list[PackedTensors]]:
    """Bytes and what they are spent on; read again to the same bits from names, shapes and types alone."""
    content, rows = pack(state, {"key": "vålue"})
    packed = Packed(content)
    found = packed.unpack({name: tensor.to("meta") for name, tensor in state.items()})
    assert packed.header["key"] == "vålue"
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(raw(found[name]), raw(tensor)), name
    return len(content), rows


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def shared(shape: tuple[int, ...], sparsity: float, num_bits: int, seed: int) -> Tensor:
    """Random weights, pruned by magnitude, their values shared: a codebook of float16 numbers at quantiles."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kept = weight.abs() > (weight.abs().flatten().quantile(sparsity) if sparsity else -1.0)
    edges = weight[kept].quantile(torch.linspace(0, 1, 2**num_bits + 1)[1:-1])
    centres = torch.linspace(-2, 2, 2**num_bits).half().float()
    return torch.where(kept, centres[torch.bucketize(weight, edges)], 0.0)


def entropy_bits(tensor: Tensor) -> float:
    counts = tensor.unique(return_counts=True)[1].double()
    return float((counts * (tensor.numel() / counts).log2()).sum())


QUICK = {(1, 0.0), (2, 0.5), (4, 0.9), (4, 0.99), (8, 0.9)}


@pytest.mark.parametrize(
    ("num_bits", "sparsity"),
    [
        pytest.param(b, s, marks=[] if (b, s) in QUICK else [pytest.mark.slow])
        for b in range(1, 9)
        for s in (0.0, 0.5, 0.9, 0.99)
    ],
)
def test_weights_cost_their_entropy(num_bits: int, sparsity: float) -> None:
    weight = shared((160, 24, 3, 3), sparsity, num_bits, seed=num_bits)
    size, (row,) = there_and_back({"conv.weight": weight})
    header = 40 * 8 + 24 * row.num_distinct  # frame, JSON, a codebook of float16 numbers and how frequent each is
    assert 8 * size <= 1.03 * entropy_bits(weight) + header
    assert row.num_nonzero == int((weight != 0).sum())


def low_bit(method: Method) -> tuple[State, list[str]]:
    """The shipped net with rounded weights in every third layer, and the names of those."""
    torch.manual_seed(0)
    net = SmallInception(10, (1, 28, 28))
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)][1:-1:3]
    rounding = LowBitWeights(method, layers)
    rounding.attach_(net)
    rounding.detach_()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    rounding.write_(state)
    return state, [f"{layer}.weight" for layer in layers]


@pytest.mark.parametrize(
    ("method", "most"), [("bwn", 1.0), ("twn", 1.585), pytest.param("ttq", 1.585, marks=pytest.mark.slow)]
)
def test_binary_and_ternary_weights_cost_a_bit_and_a_trit(method: Method, most: float) -> None:
    """On average over a net's layers; the scales come on top, one of 24 bits a filter or a layer."""
    state, names = low_bit(method)
    _, chosen = pack({name: state[name] for name in names}, {})
    num = sum(row.num for row in chosen)
    scales = sum(len(state[name]) if method == "bwn" else 2 for name in names)
    assert sum(row.bits for row in chosen) <= 1.005 * most * num + 32 * scales
    assert sum(row.value_bits + row.position_bits for row in chosen) <= 1.005 * most * num
    assert sum(row.codebook_bits for row in chosen) <= 0.1 * num


def test_filters_of_two_values_keep_their_bits() -> None:
    """Signs and a scale each, and what is near it: one value in a filter, two that do not mirror, three in one."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(40, 1, 1, 1, generator=generator) + 0.1
    binary = scales * torch.randn(40, 16, 3, 3, generator=generator).sign()
    some_one = torch.cat([binary[:20], scales[:20].expand(20, 16, 3, 3), -scales[20:].expand(20, 16, 3, 3)])
    apart = torch.where(binary > 0, binary, 3 * binary.square())
    three = binary.clone()
    three[7, 5, 1, 1] = 0.7
    matrix = (64 * scales).round()[:, :, 0, 0] / 64 * torch.randn(40, 9, generator=generator).sign()
    state = {"a": binary, "b": some_one, "c": scales.expand(40, 16, 3, 3), "d": apart, "e": three, "f": matrix}
    rows = {row.name: row for row in there_and_back(state)[1]}
    for name in ("a", "b"):
        assert rows[name].bits < 1.02 * rows[name].num + 32 * 40
    assert rows["c"].bits < 32 * 40 and rows["d"].bits < 1.02 * rows["d"].num + 64 * 40
    assert rows["e"].bits > 4 * rows["e"].num, "the control: as a codebook"
    assert rows["f"].bits < 1.1 * rows["f"].num + 8 * 40


def test_special_values_keep_their_bits() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.4e38, 2**-24, 65504.0])
    nans = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    state = {"a.weight": torch.cat([values, nans]).repeat(3, 1), "a.bias": values, "b.bias": torch.ones(3)}
    there_and_back(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_other_types_keep_their_bits(dtype: torch.dtype) -> None:
    values = 100 * torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there_and_back({"w": values.to(dtype), "v": values[0].to(dtype), "s": values[0, 0].to(dtype)})


def test_empty_and_constant_tensors_cost_next_to_nothing() -> None:
    state = {"none": torch.zeros(0, 3), "zeros": torch.zeros(1000, 1000), "ones": torch.full((500, 500), 1 - 1e-5)}
    size, _ = there_and_back({**state, "a.count": torch.tensor(2150), "b.count": torch.tensor(2150)})
    assert size < 100


def test_steps_of_a_power_of_two_cost_their_integers() -> None:
    """Scales and shifts on a grid, another step for each layer: together in one table of frequencies."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{layer}.norm.weight": (30 * torch.randn(64, generator=generator)).round() * 2.0 ** (-4 - layer % 5) + 0.0
        for layer in range(20)
    }
    size, (row,) = there_and_back(state)
    ideal = row.num * np.log2(30 * np.sqrt(2 * np.pi * np.e))
    assert 8 * size < 1.03 * ideal + 20 * 3 + 500


@pytest.mark.parametrize("seed", range(4))
def test_random_nets_keep_their_bits(seed: int) -> None:
    """Layers of many shapes, some pruned, some shared, some rounded to formats, some as they are."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for layer in range(8):
        shape = tuple(torch.randint(1, 12, (int(torch.randint(1, 5, (), generator=generator)),), generator=generator))
        weight = torch.randn([int(side) for side in shape], generator=generator)
        kind = int(torch.randint(0, 6, (), generator=generator))
        weight *= torch.rand(weight.shape, generator=generator) < (0.1, 0.5, 1, 1, 1, 0)[kind]
        exact = (weight, (weight * 4).round() / 4, weight.half().float(), weight.bfloat16().float(), weight, weight)
        weight = exact[kind]
        state |= {f"{layer}.weight": weight, f"{layer}.bias": torch.randn(shape[0], generator=generator)}
    there_and_back(state)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if "LeNet300" in n else [pytest.mark.slow]) for n in NETS])
def test_the_shipped_nets_keep_their_bits(name: str) -> None:
    there_and_back(build(name).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_thinned_nets_keep_their_bits(name: str) -> None:
    there_and_back(masked_and_thinned(name, 0.5)[1].state_dict())


def state_of_old() -> State:
    index = torch.arange(60)
    return {
        "conv.weight": torch.where(index % 7 < 2, ((index * 37 % 11) - 5) / 8, 0.0).reshape(5, 4, 3),
        "fc.weight": (index[:20] * 7919 % 1013 / 1013).half().float().reshape(4, 5),
        "fc.bias": ((index[:20] * 31 % 97) - 48) / 64,
        "norm.running_var": torch.full((8,), 1 - 1e-5),
        "count": torch.tensor(7),
    }


def test_a_file_of_an_older_day_is_read() -> None:
    """A change of the models, of the dictionary or of the library's arithmetic must not pass without a new version."""
    state = state_of_old()
    found = Packed(bytes.fromhex(OLD)).unpack({name: tensor.to("meta") for name, tensor in state.items()})
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


OLD = (
    "934e455401e8d7121e5ab8a6d61800000003950d95408d658797e494a602ed2f4b04d2e0d460590b003eeecc10c411a232aa"
    "1ba3d8c5b9c9063d583e414b80fedce52773fd6f4689aabec219b35752dc61bcfa55b326b15edb97da48283b3a3cdb237794"
    "563a6ab6963763cb2b7106fc450ba9f463918c903214bd1f0e13227a052422b6f9"
)


def test_what_the_format_has_no_place_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"w holds torch.complex64"):
        pack({"w": torch.zeros(3, dtype=torch.complex64)}, {})
    monkeypatch.setattr("project.deployment.packed.packing.max_values", lambda num_bytes: 10 * num_bytes)
    state = {"w": torch.zeros(100, 100)}
    with pytest.raises(ValueError, match="beyond what the packed format allows"):
        pack(state, {})


@pytest.mark.slow
def test_ten_million_weights(capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (4000, 2500), generator=generator) / 64
    weight *= torch.rand(weight.shape, generator=generator) < 0.1
    start = time.perf_counter()
    content, _ = pack({"w": weight}, {})
    middle = time.perf_counter()
    found = Packed(content).unpack({"w": weight.to("meta")})["w"]
    end = time.perf_counter()
    assert torch.equal(found, weight)
    with capsys.disabled():
        seconds = f"written in {middle - start:.1f} s, read in {end - middle:.1f} s"
        sys.stdout.write(f"10 million weights: {len(content):,} bytes, {seconds}\n")
