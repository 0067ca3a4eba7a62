"""CIFAR from files in its own format (Python 2's pickle protocol), from its archive, and never running code."""

import pickle
import random
import tarfile
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from project.data import CIFAR10, CIFAR100
from project.data.sets.cifar import CifarDataModule, load_pickle

NUM = 20


def write_batches(cls: type[CifarDataModule], folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    classes = len(cls.class_names)
    for name in (*cls.train_files, *cls.test_files):
        entries = {
            b"batch_label": name.encode(),
            cls.label_key.encode(): generator.integers(0, classes, NUM).tolist(),
            b"data": generator.integers(0, 256, (NUM, 3072), dtype=np.uint8),
            b"filenames": [b"x.png"] * NUM,
        }
        (folder / name).write_bytes(pickle.dumps(entries, protocol=2))


@pytest.mark.parametrize("cls", [CIFAR10, CIFAR100])
@pytest.mark.parametrize("place", [".", "{}"])
def test_reads_its_batches(tmp_path: Path, cls: type[CifarDataModule], place: str) -> None:
    folder = tmp_path / place.format(cls.__name__) / cls.folder_name
    write_batches(cls, folder)
    data = cls(batch_size=8, data_dir=str(tmp_path))
    data.prepare_data()
    images, labels = data.load(train=True)
    assert images.shape == (NUM * len(cls.train_files), 3, 32, 32) and images.dtype == torch.uint8
    first = pickle.loads((folder / next(iter(cls.train_files))).read_bytes())
    assert np.array_equal(images[:NUM].numpy().reshape(NUM, 3072), first[b"data"])
    assert labels[:NUM].tolist() == first[cls.label_key.encode()]
    assert cls(data_dir=str(folder)).load(train=False)[0].shape == (NUM, 3, 32, 32)


def test_class_names() -> None:
    assert CIFAR10().num_classes == 10 and CIFAR100().num_classes == 100
    assert list(CIFAR100.class_names) == sorted(CIFAR100.class_names)


def test_archive_in_the_data_folder_is_unpacked(tmp_path: Path) -> None:
    write_batches(CIFAR10, tmp_path / "made" / CIFAR10.folder_name)
    with tarfile.open(tmp_path / CIFAR10.archive[0], "w:gz") as tar:
        tar.add(tmp_path / "made" / CIFAR10.folder_name, CIFAR10.folder_name)
    data = CIFAR10(data_dir=str(tmp_path))
    data.prepare_data()
    assert len(data.load(train=False)[0]) == NUM
    assert not list(tmp_path.glob(".unpack-*"))


def test_truncated_archive_and_batch_are_named(tmp_path: Path) -> None:
    archive = tmp_path / CIFAR10.archive[0]
    archive.write_bytes(b"\x1f\x8b nonsense")
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is truncated or damaged"):
        CIFAR10(data_dir=str(tmp_path)).prepare_data()
    write_batches(CIFAR10, tmp_path / CIFAR10.folder_name)
    batch = tmp_path / CIFAR10.folder_name / "test_batch"
    batch.write_bytes(batch.read_bytes()[:1000])
    with pytest.raises(ValueError, match="test_batch is truncated or damaged"):
        CIFAR10(data_dir=str(tmp_path)).setup("test")


def test_wrong_labels_and_missing_pixels_are_named(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR10.folder_name
    write_batches(CIFAR10, folder)
    pixels = np.zeros((1, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": pixels, b"labels": [10]}, protocol=2))
    with pytest.raises(ValueError, match="labels 10 to 10, but CIFAR10 has 10 classes"):
        CIFAR10(data_dir=str(tmp_path)).load(train=False)
    (folder / "test_batch").write_bytes(pickle.dumps({b"labels": [1]}, protocol=2))
    with pytest.raises(ValueError, match="holds no 'data'"):
        CIFAR10(data_dir=str(tmp_path)).load(train=False)


def test_missing_and_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    with pytest.raises(ValueError, match=r"put cifar-100-python.tar.gz"):
        CIFAR100(data_dir=str(tmp_path)).prepare_data()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit",)


def test_pickles_run_no_code() -> None:
    with pytest.raises(ValueError, match=r"asks for .*exec"):
        load_pickle(pickle.dumps({b"data": Evil()}, protocol=2), Path("evil"))


def test_an_array_as_python_2_wrote_it() -> None:
    """Python 2's text, ``numpy.core`` and integers for the flags of a dtype, as in the published files."""
    written = (
        b"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n(I0\ntS'b'\ntRp5\n"
        b"(I1\n(I1\nI3\ntcnumpy\ndtype\np6\n(S'u1'\nI0\nI1\ntRp7\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\xff\\x80'\ntbs."
    )
    assert load_pickle(written, Path("batch"))["data"].tolist() == [[1, 255, 128]]


PIXELS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    "entries",
    [
        *({b"data": PIXELS, b"labels": [1, label]} for label in (1.5, True, None, "1", [1], 10**30, np.int64(1))),
        *({b"data": PIXELS.astype(kind), b"labels": [1, 2]} for kind in ("float32", ">i8", "int8", "object", "U3")),
        *({b"data": data, b"labels": [1, 2]} for data in ("x", None, [1, 2], PIXELS[:1], PIXELS[:, :9], PIXELS[None])),
        *({b"data": PIXELS, b"labels": labels} for labels in ((1, 2), {1: 2}, "12", None, np.array([1, 2]))),
        *({b"\xff": 1}, {3: 4}, [1], None, "x"),
    ],
    ids=str,
)
def test_odd_values_are_one_sentence(tmp_path: Path, entries: object) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(entries, protocol=2))
    with pytest.raises(ValueError, match=r"test_batch .*download it again") as error:
        CIFAR10(data_dir=str(tmp_path))._read(path, "")
    assert type(error.value) is ValueError and "\n" not in str(error.value) and len(str(error.value)) < 500


ENCODE = b"c_codecs\nencode\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        pytest.param(b"\x80\x02N" + b"r\xff\xff\xff\x3f" + b".", "holds no batch", id="memory of a billion places"),
        pytest.param(b"\x80\x05\x96" + b"\xff" * 5 + b"\0\0\0.", "a code that makes", id="a byte array of a terabyte"),
        pytest.param(
            b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns.",
            "a tuple twice", id="a tuple whose hash takes 2^60 steps",
        ),
        pytest.param(
            b"\x80\x02X\xe8\x03\0\0" + b"x" * 1000 + b"q\0" + (ENCODE + b"(h\0X\x06\0\0\0latin1tR") * 500 + b".",
            "more bytes than it holds", id="a text of a thousand bytes, five hundred times",
        ),
        pytest.param(b"cnumpy\nndarray\n((L99999999999L\ntt R.", "damaged", id="an array of 100 GB"),
        pytest.param(
            ARRAY + b"(I1\n(L99999999999L\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'ab'\ntb.", "of 2 bytes", id="two bytes"
        ),
        pytest.param(b"\x80\x02" + b"]" * 100_000 + b".", "holds no batch", id="deep lists"),
    ],
)  # fmt: skip
def test_a_pickle_takes_no_more_than_its_size(code: bytes, words: str) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match=words):
        load_pickle(code, Path("batch"))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def archive_of(path: Path, members: dict[str, tuple[bytes, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, (kind, content) in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(info, BytesIO(content))


def test_an_archive_of_other_things_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / CIFAR10.archive[0]
    folder = CIFAR10.folder_name
    monkeypatch.setattr("project.data.sets.cifar._MAX_UNPACKED", 1 << 20)
    for name, (kind, content), words in (
        (f"{folder}/x", (tarfile.SYMTYPE, b""), "no file of images"),
        (f"{folder}/x", (tarfile.LNKTYPE, b""), "no file of images"),
        (f"{folder}/x", (tarfile.FIFOTYPE, b""), "no file of images"),
        (f"{folder}/x", (tarfile.REGTYPE, bytes(1 << 21)), "no file of images"),
        ("../x", (tarfile.REGTYPE, b"x"), "outside"),
    ):
        archive_of(archive, {f"{folder}/test_batch": (tarfile.REGTYPE, b"x"), name: (kind, content)})
        with pytest.raises(ValueError, match=words):
            CIFAR10(data_dir=str(tmp_path)).prepare_data()
    archive_of(archive, {f"{folder}/{number}": (tarfile.REGTYPE, bytes(1 << 18)) for number in range(5)})
    with pytest.raises(ValueError, match="holds more than 1048576 bytes"):
        CIFAR10(data_dir=str(tmp_path)).prepare_data()
    archive_of(archive, {f"{folder}/test_batch": (tarfile.REGTYPE, random.Random(0).randbytes(500_000))})
    whole = archive.read_bytes()
    for content in (whole[:-100], whole[:9000] + bytes(20) + whole[9020:]):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match="is truncated or damaged"):
            CIFAR10(data_dir=str(tmp_path)).prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
