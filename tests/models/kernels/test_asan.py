"""The kernels read and write within their tensors: their tests run once under GCC's AddressSanitizer. It also watches
torch's memory, since torch gets it from the same allocator.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernels")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc here, whose AddressSanitizer this test needs")
    libraries = [find(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(library.is_file() for library in libraries):
        pytest.skip("gcc has no libasan.so here, which is its AddressSanitizer")
    return os.environ | {
        "CC": compiler,
        "LD_PRELOAD": " ".join(str(library.resolve()) for library in libraries),  # the second one for C++ exceptions
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
        "PROJECT_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }


def find(compiler: str, library: str) -> Path:
    command = [compiler, f"-print-file-name={library}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def run(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests/helpers/asan.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_write_past_the_end_is_found(environment: dict[str, str]) -> None:
    """One value, behind a tensor of 31. Without this the next test could pass because nobody watches."""
    result = run(environment, "write")
    assert result.returncode != 0
    for words in ("AddressSanitizer", "WRITE of size", "max_pool.c", "124-byte region"):
        assert words in result.stderr


def test_no_kernel_leaves_its_tensors(environment: dict[str, str]) -> None:
    result = run(
        environment,
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/models/kernels",
        "--ignore=tests/models/kernels/test_build.py",
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert " passed" in result.stdout
