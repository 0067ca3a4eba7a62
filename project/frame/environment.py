"""What a number was measured on: versions, commit, machine. Names no host, user or path."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics", "numpy", "jsonargparse", "onnxruntime", "openvino")


def describe_environment() -> dict[str, Any]:
    """Plain values; ``None`` where something cannot be found out."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(changed)
        if (changed := _git("status", "--porcelain", "--untracked-files=no")) is not None
        else None,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_abilities": cpu_abilities(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def cpu_model() -> str | None:
    """The processor's name."""
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def cpu_abilities() -> str:
    """What decides how fast a processor computes with small numbers, such as ``AVX-512, no VNNI, no bfloat16``.

    VNNI multiplies bytes and adds the products in 32 bits: without it int8 is hardly faster than fp32. On other
    processors than x86 the kind of processor alone is known.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine()
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    avx512 = found.get("avx512_f", torch.cpu._is_avx512_supported())
    avx2 = found.get("avx2", torch.cpu._is_avx2_supported())
    vnni = found.get("avx512_vnni", torch.cpu._is_vnni_supported()) or found.get("avx_vnni") or found.get("amx_int8")
    bfloat16 = found.get("avx512_bf16", torch.cpu._is_avx512_bf16_supported()) or found.get("amx_bf16")
    vectors = "AVX-512" if avx512 else "AVX2" if avx2 else "no AVX2"
    return f"{vectors}, {'VNNI' if vnni else 'no VNNI'}, {'bfloat16' if bfloat16 else 'no bfloat16'}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the checkout that holds the package; ``None`` outside of one."""
    checkout = Path(__file__).resolve().parents[2]
    return _output("git", "-C", str(checkout), *arguments) if (checkout / ".git").exists() else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
