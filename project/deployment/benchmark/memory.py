"""How much memory an engine takes. Each engine is measured in its own process, which does nothing else.

The result is the peak of the process's resident memory between loading the net and the end of one batch, minus its
resident memory just before, when the packages are already imported. It counts the weights, the runtime's own copies and
plans, the activations, and the pages of libraries that are used for the first time (about 10 MB). For ``compiled`` it
includes the compilation. It leaves out what the packages themselves take (torch about 200 MB). On a GPU it is
``torch.cuda.max_memory_allocated``: the weights and activations on the GPU. Repeated measurements differ by a few
percent.

A fresh process that computes nothing imports the packages once. It forks for every engine, so the system needs
``fork``.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from project.deployment.engines import FILE_ENGINES, engine


def peak_memory(
    engines: Sequence[tuple[str, nn.Module | Path]], image_shape: tuple[int, int, int], batch_size: int = 64
) -> list[int | str]:
    """Bytes that each engine takes for one batch. If a measurement failed: a text with the reason.

    Args:
        engines: name of each engine (:mod:`project.deployment.engines`) with its net, or with the path of a model
            file if the engine runs files. The net's class can be imported.
        image_shape: shape (C, H, W) of one image.
        batch_size: number of images in the batch; 1 or more.
    """
    with tempfile.TemporaryDirectory() as folder:
        tasks, failed = [], dict[int, str]()
        for index, (name, net) in enumerate(engines):
            path, module = net, name.partition("-")[0]
            if isinstance(net, nn.Module):
                path, module = Path(folder) / f"{index}.pt", type(net).__module__
                try:
                    torch.save(net, path)
                except Exception as error:  # a parametrized weight or a lambda, for example
                    failed[index] = _reason(error)
                    continue
            tasks.append({"name": name, "path": str(path), "module": module, "images": [batch_size, *image_shape]})
        done = subprocess.run(
            [sys.executable, "-c", "from project.deployment.benchmark.memory import main; main()"],
            input=json.dumps({"num_threads": torch.get_num_threads(), "tasks": tasks}),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"])[-1]
        found: list[int | str] = [reason] * len(tasks)
    else:
        found = json.loads(done.stdout.splitlines()[-1])
    measured = iter(found)
    return [failed[index] if index in failed else next(measured) for index in range(len(engines))]


def main() -> None:
    """Code of the fresh process: it reads tasks from standard input and writes a list of results to standard output."""
    work = json.loads(sys.stdin.read())
    for module in dict.fromkeys(task["module"] for task in work["tasks"]):
        importlib.import_module(module)
    results = [_in_a_fork(partial(_measure, task, work["num_threads"])) for task in work["tasks"]]
    sys.stdout.write(f"\n{json.dumps(results)}\n")


def _measure(task: dict[str, Any], num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    images = torch.zeros(task["images"])
    before = _restart_peak()
    if task["name"] in FILE_ENGINES:
        run = FILE_ENGINES[task["name"]](Path(task["path"]))
    else:
        net = torch.load(task["path"], weights_only=False)  # written by the process that started this one
        run = engine(task["name"], net, tuple(task["images"][1:]))
        del net
    run(images)
    return torch.cuda.max_memory_allocated() if task["name"].startswith("cuda") else _peak() - before


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _in_a_fork(function: Callable[[], int]) -> int | str:
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            result: int | str = function()
        except BaseException as error:
            result = _reason(error)
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(process, 0)
    text = os.read(read, 1 << 16)
    os.close(read)
    return json.loads(text) if text else "its process was killed"


def _restart_peak() -> int:
    """Resident memory now, in bytes. On Linux the peak is counted from now on, elsewhere from the process's start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    if Path("/proc/self/status").is_file():
        return _status("VmHWM")  # getrusage would include the peak of the parent process
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
