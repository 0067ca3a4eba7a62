"""Building the kernels: once, into the cache; again if the file is damaged; without a compiler, without a complaint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from project.models.kernels import build
from project.models.kernels.build import library
from project.models.layers import ConvNormAct


@pytest.fixture(autouse=True)
def forget_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROJECT_CACHE_DIR", str(tmp_path / "cache"))
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.usefixtures("kernels")
def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library(torch.float32) is not None
    (built,) = (tmp_path / "cache").iterdir()
    time = built.stat().st_mtime_ns
    library.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert library(torch.float32) is not None
    assert built.stat().st_mtime_ns == time


@pytest.mark.usefixtures("kernels")
def test_a_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library(torch.float32) is not None
    (built,) = (tmp_path / "cache").iterdir()
    content, num_compiled = built.read_bytes(), 0

    def compile_again(compiler: str, flags: tuple[str, ...], target: Path) -> None:
        nonlocal num_compiled
        num_compiled += 1
        target.write_bytes(content)

    monkeypatch.setattr(build, "_compile", compile_again)
    flipped = content[:9000] + bytes([content[9000] ^ 1]) + content[9001:]
    for number, damaged in enumerate((content[:20000], content[:-1], content + b"0", flipped, b"", b"text"), start=1):
        built.unlink()  # the process still runs the code of the old file
        built.write_bytes(damaged)
        library.cache_clear()
        assert library(torch.float32) is not None
        assert num_compiled == number and built.read_bytes() == content


def test_a_library_without_the_functions_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "empty.c"
    source.write_text("int nothing;")
    monkeypatch.setattr(build, "SOURCES", [source])
    assert library(torch.float32) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", sys.executable])
def test_without_a_compiler_torch_does_the_work(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    assert library(torch.float32) is None
    assert library(torch.bfloat16) is None
    assert not list(tmp_path.glob("cache/*"))
    layer = ConvNormAct(3, 8, 3).to(memory_format=torch.channels_last)
    layer(torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)).sum().backward()


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_KERNELS", "0")
    assert library(torch.float32) is None
