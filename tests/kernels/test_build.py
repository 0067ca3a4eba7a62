"""Building the kernels: once, into the cache; without a compiler, without a complaint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from project.kernels.build import library
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
