"""``project fit`` in a process that ``scripts/kill_and_resume.py`` kills.

The process appends to a file of notes what it is doing and which files it writes and renames. It kills itself, and all
processes of its run, when it reaches a chosen file: before a rename, or when a file has reached a chosen size.
"""

import ctypes
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from project.__main__ import main

SLOW_IMPORTS = (
    "project.frame.cli",
    "project.callbacks",
    "project.compression",
    "project.deployment.int8.callback",
    "project.deployment.packed.callback",
    "sklearn.datasets",
    "tensorboard.compat.tensorflow_stub",
    "torch.utils.tensorboard",
    "torch.export",
    "onnxscript",
    "onnxruntime",
    "constriction",
)
"""Modules that a fit needs. They are imported once, before the processes are forked."""
DOING = (
    ("pruning/callback.py", "_begin_round", "a round begins"),
    ("weight_sharing/callback.py", "_share", "weights are shared"),
    ("weight_sharing/callback.py", "_finish", "shared weights are finished"),
    ("low_bit/ternary_callback.py", "_finish", "ternary weights are finished"),
    ("pruning/callback.py", "_remove", "units are removed"),
    ("deployment/int8/", "", "int8 calibration"),
    ("deployment/packed/", "", "packing"),
    ("deployment/export.py", "", "export"),
    ("compression/report.py", "", "report"),
    ("trainer/trainer.py", "save_checkpoint", "a checkpoint is written"),
    ("frame/trainer.py", "_test_best", "test"),
    ("loops/evaluation_loop.py", "run", "validation"),
    ("loops/training_epoch_loop.py", "advance", "training"),
    ("loops/fit_loop.py", "", "between epochs"),
    ("frame/trainer.py", "fit", "begin and end of the fit"),
)
"""What the innermost function of a stack that is named here means: part of its path, its name, and words for it."""
START = "start"


class Witness:
    """Writes the notes, and kills the processes of the run at the target.

    Args:
        root: folder of the run's logs, temporary files and notes.
        target: kind of event (write or rename), name of the file, number of the event of this kind and name, counted
            from 1, and the number of bytes that are still written; ``None`` ends the process nowhere.
    """

    def __init__(self, root: Path, target: tuple[str, str, int, int] | None) -> None:
        self.root = str(root)
        self.target, self.num_left, self.is_limited = target, 0 if target is None else target[2], False
        self.notes = os.open(root / "notes.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.main_thread = threading.main_thread().ident
        self.on_limit = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _kill())
        self.note("doing", START)
        threading.Thread(target=self.watch, daemon=True).start()
        sys.addaudithook(self.audit)
        self.save = torch.save
        setattr(torch, "save", self.save_and_note)  # noqa: B010  torch opens files from C++, which no hook sees

    def note(self, kind: str, name: str, size: int = 0) -> None:
        if not self.is_limited:  # the notes are a file too, and may be longer than the limit
            os.write(self.notes, f"{time.monotonic():.4f}\t{kind}\t{name}\t{size}\n".encode())

    def watch(self) -> None:
        """Note each change of what the main thread is doing."""
        last = START
        while True:
            doing = doing_of(sys._current_frames().get(self.main_thread or 0))
            if doing != last and (doing != START or last == START):
                last = doing
                self.note("doing", doing)
            time.sleep(0.002)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python calls this before it opens or renames a file."""
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.see("write", args[0], bool(args[2] & os.O_APPEND))
        elif event == "os.rename":
            self.see("rename", args[1], source=args[0])

    def save_and_note(self, content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        self.see("write", file)
        self.save(content, file, *args, **kwargs)

    def see(self, kind: str, path: Any, appends: bool = False, source: Any = None) -> None:
        if not isinstance(path, str | os.PathLike) or not (path := os.fspath(path)).startswith(self.root):
            return
        name = name_of(Path(path))
        if name == "log.txt":
            return
        size = os.path.getsize(source if source is not None else path) if source is not None or appends else 0  # noqa: PTH202
        self.note(kind, name, size)
        if self.is_limited and kind == "rename":  # the file is shorter than the limit
            _kill()
        if self.target is None or self.target[:2] != (kind, name):
            return
        self.num_left -= 1
        if self.num_left == 0 and kind == "rename":
            _kill()
        if self.num_left == 0:
            self.is_limited = True
            ctypes.CDLL(None).signal(int(signal.SIGXFSZ), self.on_limit)  # Python ignores this signal of the limit
            limit = size + self.target[3]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _kill() -> None:
    os.killpg(0, signal.SIGKILL)


def name_of(path: Path) -> str:
    """The name of a file without the number of the process that writes it."""
    if path.parent.name == "tmp":
        return "a temporary file"
    if path.name.startswith("events.out"):
        return "events"
    return path.name.lstrip(".").lstrip("0123456789").lstrip(".") or path.name


def doing_of(frame: FrameType | None) -> str:
    """What a thread is doing, in words."""
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        for part, name, words in DOING:
            if part in path and name in ("", function):
                return words
        frame = frame.f_back
    return START


def fit(args: Sequence[str], root: Path, target: tuple[str, str, int, int] | None) -> None:
    """Run ``project fit``, in a group of processes of its own.

    Args:
        args: options of the command.
        root: folder of the run's logs, temporary files and notes.
        target: as in :class:`Witness`.
    """
    os.setsid()
    out = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    temporary = root / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ |= {"PROJECT_LOGS_DIR": str(root / "logs"), "TMPDIR": str(temporary)}
    tempfile.tempdir = None
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Witness(root, target)
    sys.argv = [str(Path(__file__).resolve()), "fit", *args]
    main()


if __name__ == "__main__":  # a further process of DDP, which Lightning starts
    main()
else:
    for module in SLOW_IMPORTS:
        try:
            import_module(module)
        except ImportError:  # a copy of the package without this room
            continue
