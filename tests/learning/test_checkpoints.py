"""Damaged checkpoints: each is refused in one sentence. The bytes of a checkpoint depend on its values alone."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.versioned_net import Versioned

from project.learning import Classifier
from project.learning.checkpoints import check_checkpoint, load_net, one_object_each
from project.models import SmallInception

ARGUMENTS = {"num_classes": 2, "image_shape": [1, 8, 8], "width": 0.25}
NET = {"class_path": "project.models.SmallInception", "init_args": ARGUMENTS}


@pytest.fixture
def module() -> Classifier:
    torch.manual_seed(0)
    net = SmallInception(2, (1, 8, 8), width=0.25)
    return Classifier(net=net, num_classes=2, image_shape=(1, 8, 8), class_names=("a", "b"))


def content_of(module: Classifier) -> dict[str, Any]:
    arguments = {"net": NET, "num_classes": 2, "image_shape": [1, 8, 8], "class_names": ["a", "b"]}
    content = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.6.0", "state_dict": module.state_dict()}
    return content | {"hparams_name": "kwargs", "hyper_parameters": arguments, "surgeries": []}


def write(content: Any, path: Path) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


def changed(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The file with one weight more, so that its size is another; or with the same parts compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w", compression) as target:
        for name in source.namelist():
            more = bytes(4) if name.endswith("data/0") and compression == zipfile.ZIP_STORED else b""
            target.writestr(name, source.read(name) + more)
    return stream.getvalue()


def read(path: Path) -> Classifier:
    check_checkpoint(path)
    return Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)


def test_one_wrong_bit_is_seen(module: Classifier, tmp_path: Path) -> None:
    """torch does not check the checksums of a file."""
    path = tmp_path / "x.ckpt"
    content = bytearray(write(content_of(module), path))
    assert torch.equal(read(path).net.fc.weight, module.net.fc.weight)
    place = content.find(module.net.fc.weight.detach().numpy().tobytes()[:64])
    content[place + 40] ^= 1
    path.write_bytes(content)
    for reader in (check_checkpoint, lambda path: load_net(module, path)):
        with pytest.raises(ValueError, match="or it is damaged"):
            reader(path)


def test_parts_that_do_not_fit_are_refused(module: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    content = write(content_of(module), path)
    for bad in (changed(content), changed(content, zipfile.ZIP_DEFLATED), content[:-30], content[: len(content) // 2]):
        path.write_bytes(bad)
        for reader in (read, lambda path: load_net(module, path)):
            with pytest.raises(ValueError, match=r"x\.ckpt|does not fit") as error:
                reader(path)
            assert "\n" not in str(error.value)


ODD_SLICES: list[Any] = [
    *(3, [3], {"fc.weight": 3}, {"fc.weight": [3]}, {"fc.weight": ["x", None]}, {"fc.weight": [[-1], None]}),
    *({"fc.weight": [[99], None]}, {"fc.weight": [[], None]}, {"fc.weight": [-1, None]}, {3: [[0]]}),
]


@pytest.mark.parametrize(
    "odd",
    [
        *({"state_dict": state} for state in (None, [], {"net.fc.weight": 3}, {})),
        *(
            {"surgeries": surgeries}
            for surgeries in (3, [3], [{}], [{"type": "Thin", "x": 3}], [{"type": "os.system"}])
        ),
        *({"surgeries": [{"type": "Thin", "slices": slices}]} for slices in ODD_SLICES),
        *({"hyper_parameters": values} for values in (3, {"net": 3}, {"net": NET, "num_classes": "x"})),
    ],
    ids=str,
)
def test_odd_values_are_one_sentence(odd: dict[str, Any], module: Classifier, tmp_path: Path) -> None:
    write(content_of(module) | odd, tmp_path / "x.ckpt")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "x.ckpt")
    assert "\n" not in str(error.value)


def test_the_bytes_of_a_checkpoint_do_not_tell_which_texts_are_one_object():
    name = "".join(["sco", "re"])
    first = {"levels": [{"score": 0.5}, {"score": 0.6}], "betas": [(0.9, 0.99)] * 2, "names": ["score"]}
    second = {"levels": [{"score": 0.5}, {name: 0.6}], "betas": [(0.9, 0.99), (0.9, float("0.99"))], "names": [name]}
    assert pickle.dumps(first) != pickle.dumps(second)
    found = [one_object_each(each) for each in (first, second)]
    assert found[0] == first and pickle.dumps(found[0]) == pickle.dumps(found[1])


def test_weights_from_another_process_keep_the_versions_of_their_modules() -> None:
    module = Classifier(net=Versioned(), num_classes=10, image_shape=(1, 8, 8))
    state = module.state_dict()
    state["surgeries"] = []
    module.load_state_dict(state)
    assert "surgeries" in state  # the caller's dict is as it was
