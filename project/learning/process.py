"""What this machine is good at, and settings of this process."""

import ctypes
import sys

import torch
from lightning.pytorch.accelerators import Accelerator


def fastest_precision(accelerator: str | Accelerator) -> str:
    """bf16-mixed on hardware with bfloat16 products: CPUs with AVX512-BF16 or AMX, CUDA from Ampere on."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    else:
        fast = False
    return "bf16-mixed" if fast else "32-true"


def tune_process() -> None:
    """Two settings of the process that make CPU training faster and change no result that matters.

    Denormal floats (weights that decay to nothing) cost a hundred cycles each: they become 0. glibc gives the memory
    of large tensors back to the system after every step and pays page faults to get it again: it is told to keep it.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):  # another libc
            return
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
