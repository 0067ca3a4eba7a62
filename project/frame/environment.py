"""The environment of a measurement: versions, commit and machine. It contains no host name, user name or path."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from project.frame.rooms import optional

_PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics", "numpy", "jsonargparse", "onnxruntime", "openvino")


def describe_environment() -> dict[str, Any]:
    """The environment as plain values; a value that cannot be found out is ``None``."""
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
        "kernels": describe_kernels(),
    }


def describe_kernels() -> dict[str, Any]:
    """Whether the C kernels may run, the types they are built for, and the names of those that have run."""
    room = optional("models.kernels")
    return room.describe() if room else {"on": False, "built": [], "used": []}


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two environments that change the last bits of a training, as ``num_threads was 1, is 2``.

    Args:
        was: content of a run's ``environment.json``. A value that an older run lacks is not compared.
        now: environment of the fit that continues the run.
    """
    before, after = _of_bits(was), _of_bits(now)
    return [f"{key} was {before[key]}, is {after[key]}" for key in before if after.get(key, before[key]) != before[key]]


def _of_bits(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the last bits depend on. With a GPU these are not the CPU, its threads and its kernels."""
    device = environment.get("device")
    found = {"precision": environment.get("precision"), "torch": environment.get("packages", {}).get("torch")}
    found["processor"] = device
    if device in ("cpu", None):
        found["num_threads"] = environment.get("num_threads")
    if device == "cpu":
        found["processor"] = f"{environment.get('cpu')} ({environment.get('cpu_abilities')})"
        found["kernels"] = {True: "on", False: "off"}.get(environment.get("kernels", {}).get("on"))
    return {name: value for name, value in found.items() if value is not None}


def cpu_model() -> str | None:
    """The name of the processor."""
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def cpu_abilities() -> str:
    """The vector instructions of the processor, such as ``AVX-512, no VNNI, no bfloat16``.

    They decide how fast int8 and bfloat16 are. VNNI multiplies bytes and adds the products in 32 bits; without it int8
    is hardly faster than fp32. For a processor that is not x86, only its kind is known.
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
    """The output of a git command in the checkout that holds the package; ``None`` if there is no checkout."""
    checkout = Path(__file__).resolve().parents[2]
    return _output("git", "-C", str(checkout), *arguments) if (checkout / ".git").exists() else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
