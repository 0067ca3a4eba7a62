"""``model.packed``: nets built again and equal, the table, the verbs; and files that want to do harm."""

import csv
import json
import random
import re
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.nets import ALL, NETS, OTHERS, build, images_for, masked_and_thinned, recipe_of
from helpers.versioned_net import Versioned
from PIL import Image
from torch import Tensor, nn

from project import models
from project.compression import to_plain
from project.deployment.export import export
from project.deployment.model_file import Metadata, ModelFile
from project.deployment.packed import packing
from project.deployment.packed.file import open_packed, write_packed
from project.deployment.recipe import Recipe
from project.frame.paths import Run

CLASSES = ("null", "eins", "zwei", "drei", "für")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def metadata_of(name: str) -> Metadata:
    shape = ALL[name][1]
    return Metadata(CLASSES, shape, (0.3,) * shape[0], (0.4,) * shape[0])


@torch.no_grad()
def share_(net: nn.Module) -> nn.Module:
    """Prune by magnitude and round the rest to a few values, in place."""
    for parameter in net.parameters():
        if parameter.dim() > 1:
            step = parameter.abs().mean() / 2
            parameter.copy_((parameter / step).round().clamp(-6, 6).half() / 16)
            parameter *= parameter.abs() > 3 / 16
    return net


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if "-8" in n or "28x19" in n else [pytest.mark.slow]) for n in {**NETS, **OTHERS}]
)
def test_a_net_is_built_again_and_equal(name: str, tmp_path: Path) -> None:
    net = share_(build(name)).eval()
    write_packed(net, metadata_of(name), recipe_of(name), tmp_path / "model.packed")
    found, metadata = open_packed(tmp_path / "model.packed")
    assert metadata == metadata_of(name)
    assert list(found.state_dict()) == list(net.state_dict())
    for key, value in net.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    images = images_for(name)
    with torch.no_grad():
        assert torch.equal(found(images), net(images))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if "-28" in n else [pytest.mark.slow]) for n in NETS])
def test_a_thinned_net_is_exported(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, thinned, plan = masked_and_thinned(name, 0.5)
    images, recipe = images_for(name), recipe_of(name, (plan,))
    path = tmp_path / "model.packed"
    with caplog.at_level("INFO"):
        done = export(thinned, path, metadata_of(name), images, format="packed", recipe=recipe)
    assert done.difference < 1e-5
    file = ModelFile(path)
    with torch.no_grad():
        expected = thinned.eval()(images)
    for batch in (images[:1], images):
        torch.testing.assert_close(file.logits(batch), expected[: len(batch)], rtol=1e-4, atol=1e-4)
    table = (tmp_path / "model_packed.md").read_text()
    assert table in caplog.text and f"{path.stat().st_size:,} bytes" in table
    rows = read_csv(tmp_path / "model_packed.csv")
    weights = sum(value.numel() for value in thinned.state_dict().values())
    assert int(rows[-1]["num_weights"]) == weights == sum(int(row["num_weights"]) for row in rows[:-1])
    assert abs(int(rows[-1]["bytes"]) - path.stat().st_size) < 2000  # the header, with the surgery's indices
    with pytest.raises(ValueError, match="there is no recipe"):
        export(thinned, path, metadata_of(name), images, format="packed")


def test_minus_zeros_of_a_mask_are_zeros(tmp_path: Path) -> None:
    net = build("LeNet300100-9x5")
    net.fc1.weight.data *= torch.zeros_like(net.fc1.weight)
    assert net.fc1.weight.signbit().any()
    images, recipe = images_for("LeNet300100-9x5"), recipe_of("LeNet300100-9x5")
    export(net, tmp_path / "m.packed", metadata_of("LeNet300100-9x5"), images, format="packed", recipe=recipe)
    assert not open_packed(tmp_path / "m.packed")[0].fc1.weight.signbit().any()
    assert net.fc1.weight.signbit().any()


def test_the_table_has_the_papers_arithmetic(tmp_path: Path) -> None:
    """LeNet-300-100's first layer at 8 % kept and six bits: pruning alone is 32 / (0.08 (32 + 5)), and so on."""
    net = models.LeNet300100(10, (1, 28, 28))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 65, net.fc1.weight.shape, generator=generator) / 64
    net.fc1.weight.data = weight * (torch.rand(weight.shape, generator=generator) < 0.08)
    recipe = Recipe(
        {"class_path": "project.models.LeNet300100", "init_args": {"num_classes": 10, "image_shape": [1, 28, 28]}}
    )
    done = export(net, tmp_path / "m.packed", Metadata(tuple("0123456789"), (1, 28, 28), (0.5,), (0.5,)),
                  torch.randn(2, 1, 28, 28), format="packed", recipe=recipe)  # fmt: skip
    row = next(row for row in read_csv(tmp_path / "m_packed.csv") if row["layer"] == "fc1.weight")
    kept = int((net.fc1.weight != 0).sum())
    assert int(row["num_weights"]) == 235200 and float(row["kept"]) == pytest.approx(kept / 235200)
    assert int(row["weight_bits"]) == 6
    fillers = 0.92**32  # about the share of gaps above 32
    assert float(row["rate_pruned"]) == pytest.approx(32 / (0.08 * (1 + fillers) * 37), rel=0.03)
    assert float(row["rate_shared"]) == pytest.approx(32 / (0.08 * (1 + fillers) * 11 + 64 * 32 / 235200), rel=0.03)
    entropy = -(0.08 * torch.tensor(0.08).log2() + 0.92 * torch.tensor(0.92).log2()) + 0.08 * 6
    assert float(row["rate_coded"]) == pytest.approx(32 / float(entropy), rel=0.03)
    assert done.path.stat().st_size > float(row["bytes"])


# -- the verbs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_exported_tested_and_unpacked(command, digits, logs, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert command("fit", *digits, "--trainer.max_epochs=2")[0] == 0
    run = Run.find(logs / "digits")
    status, out, err = command("export", "--run", run.folder, "--format", "packed")
    assert status == 0 and "P+Q+coding" in out, err
    accuracy = json.loads(run.summary.read_text())["test/accuracy"]
    for options in (["--config", run.config], ["--data", "project.data.Digits", "--data.eval_batch_size=100"]):
        status, out, err = command("test", "--model", run.model_file("packed"), *options)
        assert status == 0 and f"test accuracy  {100 * accuracy:.2f} % of 359 images" in out, err
    quick = ("--engines", "eager", "--rounds", "1", "--memory", "false", "--num_images", "50")
    status, _, err = command("benchmark", "--run", run.folder, *quick)
    assert status == 0, err
    dense, packed = read_csv(run.benchmark("csv"))
    assert packed["file"] == "model.packed" and packed["test_accuracy"] == dense["test_accuracy"]
    assert int(packed["file_bytes"]) == run.model_file("packed").stat().st_size < int(dense["file_bytes"])
    target = tmp_path / "net.pt"
    status, out, err = command("unpack", "--model", run.model_file("packed"), "--output", target)
    assert status == 0 and str(target) in out, err
    state = torch.load(target, weights_only=True)
    checkpoint = torch.load(run.weights(), weights_only=True)["state_dict"]
    assert all(
        torch.equal(state[name.removeprefix("net.")], value) for name, value in checkpoint.items() if "net." in name
    )
    for arguments, words in (
        (["test", "--model", run.model_file("packed")], "--config FILE"),
        (["test", "--model", run.model_file("packed"), "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["test", "--model", run.model_file("packed"), "--data", "project.data.MNIST"], "28x28"),
        (["unpack", "--model", "nowhere.packed"], "no such file"),
        (["unpack"], "model"),
        (["benchmark", "--model", run.model_file("packed")], "does not take a model file"),
    ):
        status, _, err = command(*arguments)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1, err


def test_a_net_of_ones_own_needs_trust(command, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from helpers.own_net import OwnNet

    net, path = OwnNet(5), tmp_path / "own.packed"
    recipe = Recipe({"class_path": "helpers.own_net.OwnNet", "init_args": {"num_classes": 5}})
    images = torch.randn(4, 1, 8, 8)
    export(net, path, Metadata(CLASSES, (1, 8, 8), (0.3,), (0.4,)), images, format="packed", recipe=recipe)
    Image.new("L", (9, 9), 99).save(tmp_path / "photo.png")
    arguments = ["predict", "--model", path, "--images", tmp_path / "photo.png", "--output", tmp_path / "p.csv"]
    status, _, err = command(*arguments)
    assert status == 2 and "--trust helpers.own_net" in err and len(err.strip().splitlines()) == 1
    status, _, err = command(*arguments, "--trust", "other,helpers.own_net")
    assert status == 0 and len(read_csv(tmp_path / "p.csv")) == 1, err


# -- files that want to do harm ---------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a gigabyte more than now: a huge allocation fails instead of succeeding."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def small_file(folder: Path) -> bytes:
    """A thinned net with norms, pruned and shared: every part of the format is in it."""
    from project.compression.thinning.thin import Thin

    arguments = {"num_classes": 5, "image_shape": [1, 3, 3], "norm": {"class_path": "project.models.BatchNorm"}}
    kept = {"fc1": list(range(0, 300, 12)), "fc2": list(range(0, 100, 5))}
    thin = Thin({**kept, "norm1": kept["fc1"], "norm2": kept["fc2"]}, {"fc2": kept["fc1"], "fc3": kept["fc2"]})
    recipe = Recipe({"class_path": "project.models.LeNet300100", "init_args": arguments}, [to_plain(thin)])
    torch.manual_seed(0)
    net = recipe.build().to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    nn.init.normal_(net.norm1.weight)
    write_packed(share_(net), Metadata(CLASSES, (1, 3, 3), (0.3,), (0.4,)), recipe, folder / "small.packed")
    return (folder / "small.packed").read_bytes()


def framed(header: bytes, data: bytes, check: int) -> bytes:
    """A file whose own checksum is right."""
    rest = struct.pack("<II", check, len(header)) + header + data
    return b"\x93NET\x01" + struct.pack("<I", zlib.crc32(rest)) + rest


def damaged(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 4, 16))
        match rng.randrange(6):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place : place + length] = rng.randbytes(length)
            case 2:
                changed[place:place] = rng.randbytes(length)
            case 3:
                del changed[place : place + length]
            case 4:
                del changed[place:]
            case 5:
                other = rng.randrange(len(changed) + 1)
                a, b = changed[place : place + length], changed[other : other + length]
                changed[place : place + length], changed[other : other + length] = b, a
    return bytes(changed)


NASTY = (
    *(0, -1, 1, 3, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), None, True, "", [], {}, [[]], [10**9] * 3),
    *("os.system", "torch.nn.LayerNorm", {"class_path": "os.system", "init_args": {"command": "true"}}, "ü"),
)


def crafted(header: Any, rng: random.Random) -> Any:
    """A header with one value, at any depth, that somebody hostile would write there."""
    keys = list(header) if isinstance(header, dict) else list(range(len(header))) if isinstance(header, list) else []
    if not keys or rng.random() < 0.15:
        return rng.choice(NASTY)
    key = rng.choice(keys)
    if isinstance(header, dict):
        return {**header, key: crafted(header[key], rng)}
    return [*header[:key], crafted(header[key], rng), *header[key + 1 :]]


def compressed(text: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=packing._DICTIONARY)
    return compressor.compress(text) + compressor.flush()


OF_TENSORS = "match their checksum|invalid for the employed|more ones|a codebook of|an exponent of|more than 64 bits"
"""What is said when the header was right and the tensors were not."""


def attack(content: bytes, folder: Path, number: int, check: Callable[[Tensor], None]) -> int:
    """Open ``number`` files made of ``content``; each must be refused in one sentence. How many reached the tensors."""
    rng = random.Random(0)
    *_, tensors_check, length = struct.unpack_from("<4sBIII", content)
    header, data = content[17 : 17 + length], content[17 + length :]
    plain = packing.Packed(content).header
    path, reached = folder / "bad.packed", 0
    for index in range(number):
        match index % 4:
            case 0:
                bad = damaged(content, rng)
            case 1:
                bad = damaged(data, rng)
                bad = framed(header, bad + bytes(-len(bad) % 4), tensors_check)
            case 2:
                bad = framed(damaged(header, rng), data, tensors_check)
            case _:
                bad = framed(compressed(json.dumps(crafted(plain, rng)).encode()), data, tensors_check)
        path.write_bytes(bad)
        try:
            file = ModelFile(path)
        except ValueError as error:
            words = str(error)
            assert "\n" not in words and len(words) < 500 and "allocate" not in words and "memory" not in words, words
            reached += re.search(OF_TENSORS, words) is not None
        else:
            assert file.net is not None
            check(file.net)
    return reached


def attack_with(folder: Path, number: int) -> None:
    content = small_file(folder)
    expected = open_packed(folder / "small.packed")[0].state_dict()

    def same(net: nn.Module) -> None:
        """A change that is no change (two equal bytes swapped), or one of a name or a mean, leaves the weights."""
        assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())

    assert attack(content, folder, number, same) > number // 6


@pytest.mark.usefixtures("little_memory")
def test_three_hundred_damaged_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    attack_with(tmp_path, 300)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("little_memory")
def test_ten_thousand_damaged_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    attack_with(tmp_path, 10_000)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("little_memory")
def test_a_reader_without_a_checksum_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An attacker may compute the checksum of the tensors, too: then they are what the file says, and of the net."""
    content = small_file(tmp_path)
    shapes = {name: value.shape for name, value in open_packed(tmp_path / "small.packed")[0].state_dict().items()}
    monkeypatch.setattr(packing, "_checksum", lambda tensors: struct.unpack_from("<4sBIII", content)[3])

    def fits(net: nn.Module) -> None:
        assert {name: value.shape for name, value in net.state_dict().items()} == shapes

    attack(content, tmp_path, 200, fits)
    assert capfd.readouterr() == ("", "")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bombs = [b'{"a":"' + b"a" * 10**7 + b'"}', b"[" * 10**6, b'{"values":' + b"9" * 10**6 + b"}", b"\xff\xfe", b""]
    for text in bombs:
        (tmp_path / "bomb.packed").write_bytes(framed(compressed(text), b"", 0))
        with pytest.raises(ValueError, match="damaged or no model"):
            ModelFile(tmp_path / "bomb.packed")


def test_a_net_that_asks_for_the_version_of_its_weights_is_built_again(tmp_path: Path) -> None:
    net = share_(Versioned()).eval()
    metadata = Metadata(tuple("abcdefghij"), (1, 8, 8), (0.3,), (0.4,))
    write_packed(net, metadata, Recipe({"class_path": "helpers.versioned_net.Versioned"}), tmp_path / "model.packed")
    found = open_packed(tmp_path / "model.packed", trust=["helpers"])[0]
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in found.state_dict().items())
