"""Compile the C files of this folder when they are first needed, and load them.

Without a C compiler, PyTorch's own operators run instead.

The compiled libraries are in :attr:`project.frame.paths.Paths.cache`. The name of a library is a hash of the source,
the compiler and the processor, so a changed source or another machine gets its own library. Each file ends with the
checksum of the bytes before it. A damaged file is compiled again; to load it could kill the process.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from project.frame.paths import Paths, write_whole

log = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_CHECKSUM_BYTES = hashlib.sha256().digest_size
TYPES = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
"""The types of maps that there are kernels for, each with its compiler flags."""
used: set[str] = set()
"""Names of the kernels that have run since :func:`switched` was last entered."""
_is_on = True
_asked: set[torch.dtype] = set()
"""The types of maps that a library was asked for."""


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Switch the kernels on or off for the whole process until the context ends.

    Args:
        on: whether the kernels may run; ``PROJECT_KERNELS=0`` still wins.
    """
    before = _is_on
    _switch(on)
    used.clear()
    try:
        yield
    finally:
        _switch(before)


def _switch(on: bool) -> None:
    global _is_on
    if on != _is_on:
        _is_on = on
        library.cache_clear()


def describe() -> dict[str, Any]:
    """Plain values for a report: whether kernels may run (``on``), for which types they are built (``built``), and
    which have run (``used``).
    """
    built = {str(dtype).removeprefix("torch."): library(dtype) is not None for dtype in TYPES if dtype in _asked}
    on = _compiler() is not None and all(built.values())
    return {"on": on, "built": [name for name, is_built in built.items() if is_built], "used": sorted(used)}


def _compiler() -> str | None:
    """The C compiler; ``None`` if there is none, and if the kernels are switched off."""
    is_on = _is_on and os.environ.get("PROJECT_KERNELS") != "0"
    return shutil.which(os.environ.get("CC", "cc")) if is_on else None


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for maps of ``dtype`` (float32 or bfloat16).

    ``None`` if they cannot be built, or if ``PROJECT_KERNELS=0`` or :func:`switched` switches them off.
    """
    compiler = _compiler()
    if dtype not in TYPES or compiler is None:
        return None
    _asked.add(dtype)
    flags = (*FLAGS, *TYPES[dtype])
    path = Paths().cache / f"cpu_{_fingerprint(compiler, flags)}.so"
    try:
        if not _is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda part: _compile(compiler, flags, part))
        return _declare(ctypes.CDLL(str(path)), dtype)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:  # AttributeError: a function is missing
        log.info("the C kernels could not be compiled (%s): torch's own operators run, which are slower", error)
        return None


def _declare(kernels: ctypes.CDLL, dtype: torch.dtype) -> ctypes.CDLL:
    """Declare the types of the arguments; without them ctypes passes 32-bit integers."""
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    kernels.batch_norm_relu.argtypes = [pointer, *[count] * 2, *[pointer] * 2, *[number] * 2, *[pointer] * 4]
    kernels.batch_norm_relu_grad.argtypes = [pointer, pointer, *[count] * 3, *[pointer] * 4]
    kernels.batch_norm_relu_pool.argtypes = [pointer, *[count] * 6, *[pointer] * 2, *[number] * 2, *[pointer] * 6]
    kernels.batch_norm_relu_pool_grad.argtypes = [*[pointer] * 4, *[count] * 7, *[pointer] * 4]
    kernels.max_pool.argtypes = [pointer, *[count] * 9, pointer, pointer]
    kernels.max_pool_grad.argtypes = [pointer, pointer, *[count] * 9, pointer]
    kernels.first_layer.argtypes = [pointer, *[count] * 8, *[pointer] * 4, *[number] * 2, *[pointer] * 7]
    kernels.first_layer_grad.argtypes = [pointer, *[count] * 8, pointer, count, *[pointer] * 8]
    if dtype == torch.float32:
        kernels.winograd.argtypes = [pointer, *[count] * 8, *[pointer] * 3]
        kernels.winograd_lanes.restype = count
        kernels.memcmp.argtypes = [pointer, pointer, ctypes.c_size_t]  # libc's
    return kernels


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    sources = [str(source) for source in SOURCES if source.suffix == ".c"]
    command = [compiler, *flags, "-x", "c", *sources, "-o", str(target), "-lm"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    checksum = hashlib.sha256(target.read_bytes()).digest()
    with target.open("ab") as file:
        file.write(checksum)


def _is_whole(path: Path) -> bool:
    """Whether the file exists and ends with the checksum of the bytes before."""
    content = path.read_bytes() if path.is_file() else b""
    return content[-_CHECKSUM_BYTES:] == hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest()


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    parts = [source.read_bytes() for source in SOURCES]
    parts += [compiler.encode(), " ".join(flags).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """A description of the processor, which ``-march=native`` depends on.

    Machines of several kinds may share a disk, and so a cache.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
