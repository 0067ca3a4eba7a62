"""MNIST and its likes: found in every place, taken for what they are, refused when damaged or missing."""

import gzip
import logging
import struct
from pathlib import Path

import pytest
import torch

from project.data import KMNIST, MNIST, FashionMNIST
from project.data.sets.mnist import IdxDataModule
from project.frame.paths import Paths


def write_idx(path: Path, values: torch.Tensor, zipped: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()
    if zipped:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(contents, 1))
    else:
        path.write_bytes(contents)


def write_set(folder: Path, zipped: bool = True, num: int = 100, side: int = 28) -> None:
    generator = torch.Generator().manual_seed(num)
    for part, count in (("train", num), ("t10k", num // 2)):
        pixels = torch.randint(0, 256, (count, side, side), dtype=torch.uint8, generator=generator)
        write_idx(folder / f"{part}-images-idx3-ubyte", pixels, zipped)
        write_idx(folder / f"{part}-labels-idx1-ubyte", (torch.arange(count) % 10).byte(), zipped)


@pytest.fixture(autouse=True)
def no_system_data_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Paths, "system_datasets", tmp_path / "system")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["{}/raw", "{}", "."])
@pytest.mark.parametrize("cls", [MNIST, FashionMNIST, KMNIST])
def test_found_in_every_place(tmp_path: Path, cls: type[IdxDataModule], place: str, zipped: bool) -> None:
    write_set(tmp_path / place.format(cls.__name__), zipped)
    data = cls(batch_size=10, val_fraction=0.2, data_dir=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_data, data.val_data, data.test_data) if part is not None] == [80, 20, 50]
    images, labels, _ = next(iter(data.train_dataloader()))
    assert images.shape == (10, 1, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64


def test_data_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path)
    monkeypatch.setenv("PROJECT_DATA_DIR", str(tmp_path))
    assert MNIST().load(train=False)[0].shape == (50, 1, 28, 28)


def test_own_folder_comes_before_the_shared_one_and_the_system(tmp_path: Path) -> None:
    write_set(tmp_path / "system" / "fashion-mnist", num=20)
    data = FashionMNIST(data_dir=str(tmp_path / "data"))
    assert len(data.load(train=True)[0]) == 20
    write_set(tmp_path / "data", num=30)
    assert len(data.load(train=True)[0]) == 30
    write_set(tmp_path / "data" / "FashionMNIST", num=40)
    assert len(data.load(train=True)[0]) == 40


def test_files_of_a_sister_in_the_shared_folder_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from project.data.sets.idx import md5, read_bytes

    write_set(tmp_path)
    known = md5(read_bytes(tmp_path / "train-labels-idx1-ubyte.gz"))
    monkeypatch.setitem(FashionMNIST.checksums, "train-labels-idx1-ubyte", known)
    with pytest.raises(ValueError, match="MNIST's files are missing"):
        MNIST(data_dir=str(tmp_path)).load(train=True)
    assert len(FashionMNIST(data_dir=str(tmp_path)).load(train=True)[0]) == 100


@pytest.mark.parametrize(
    ("cls", "words"),
    [(FashionMNIST, "apt-get install dataset-fashion-mnist"), (MNIST, "put train-images-idx3-ubyte.gz")],
)
def test_missing_and_offline_says_what_to_do(tmp_path: Path, cls: type[IdxDataModule], words: str) -> None:
    data = cls(data_dir=str(tmp_path / "nowhere"))
    for step in (data.prepare_data, lambda: data.setup("fit"), lambda: data.setup("test")):
        with pytest.raises(ValueError, match=words) as error:
            step()
        assert "\n" not in str(error.value) and "PROJECT_DATA_DIR" in str(error.value)


def test_download_goes_to_its_own_folder_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "mirror")
    tried = []

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        tried.append(url)
        target = Path(root) / filename
        target.write_bytes((tmp_path / "mirror" / filename).read_bytes())
        if len(tried) == 1:
            raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    data = MNIST(data_dir=str(tmp_path / "data"))
    data.prepare_data()
    raw = tmp_path / "data" / "MNIST" / "raw"
    assert len(list(raw.iterdir())) == 4 and len(tried) == 5 and tried[0] != tried[1]
    data.prepare_data()
    assert len(tried) == 5 and len(data.load(train=True)[0]) == 100


def test_damage_is_refused(tmp_path: Path) -> None:
    data = MNIST(data_dir=str(tmp_path))
    write_set(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is truncated: expected 78416 bytes"):
        data.setup("fit")
    write_set(tmp_path, side=20)
    with pytest.raises(ValueError, match="28, 28"):
        data.load(train=True)
    write_set(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.full((100,), 11, dtype=torch.uint8))
    with pytest.raises(ValueError, match="100 labels up to 11"):
        data.load(train=True)
    write_idx(tmp_path / "train-labels-idx1-ubyte", torch.zeros(99, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"100 images and .* 99 labels"):
        data.load(train=True)


def test_other_contents_than_published_are_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(tmp_path)
    with caplog.at_level(logging.WARNING):
        MNIST(data_dir=str(tmp_path)).load(train=False)
    assert len(caplog.records) == 2 and "differs from the published MNIST" in caplog.text


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_the_real_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(Paths, "system_datasets", Path("/usr/share/datasets"))
    with caplog.at_level(logging.WARNING):
        images, labels = FashionMNIST(data_dir=str(tmp_path)).load(train=True)
    assert not caplog.records, "checksums"
    assert images.shape == (60000, 1, 28, 28) and labels.bincount().tolist() == [6000] * 10
    pixels = images.float().div_(255)
    assert float(pixels.mean()) == pytest.approx(FashionMNIST.mean[0], abs=1e-4)
    assert float(pixels.std()) == pytest.approx(FashionMNIST.std[0], abs=1e-4)
