"""The fastest precision of this machine, and settings of this process."""

import ctypes
import sys

import torch
from lightning.pytorch.accelerators import Accelerator


def fastest_precision(accelerator: str | Accelerator) -> str:
    """``bf16-mixed`` on hardware that multiplies bfloat16 numbers, else ``32-true``.

    Such hardware is a CPU with AVX512-BF16 or AMX, or a CUDA GPU from Ampere on.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    else:
        fast = False
    return "bf16-mixed" if fast else "32-true"


def tune_process() -> None:
    """Change two settings of the process that make training on CPUs faster and change no result that matters.

    A denormal float (from a weight that decays to 0) costs a hundred cycles; such floats become 0. After every step
    glibc returns the memory of large tensors to the system and gets it again with page faults; it is told to keep this
    memory.
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
