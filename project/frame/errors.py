"""What the user is told of an error: one sentence if the user can mend it, otherwise it is a bug of the package."""

import errno
import os
import re
import traceback
from pathlib import Path

from project.frame.parser import one_sentence

_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_LIBRARIES = re.compile(rf"[/\\](site|dist)-packages[/\\]|^<|^{re.escape(str(Path(os.__file__).parent))}[/\\]")
_CHECKS = re.compile(r"[/\\](lightning|torch[/\\](optim|utils[/\\]data))[/\\]")
"""Libraries that check what the user has chosen: Lightning, optimizers and loaders."""
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)\n    (.*)', re.MULTILINE)
_OWN = "(PROJECT_DEBUG=1 shows the traceback)"
_NO_MEMORY = re.compile("out of memory|can't allocate memory|Unable to allocate|MemoryError")


def sentence(error: BaseException) -> str | None:
    """The sentence for an error that the user can mend; ``None`` for a bug of the package.

    The user can mend a ``ValueError``, an ``OSError``, too little memory, an error that a check of Lightning, of an
    optimizer or of a loader has raised, and any error of a file that belongs neither to the package nor to a library.
    For such a file the sentence names the line.

    Args:
        error: exception that has ended the command, with its traceback.
    """
    text = "".join(traceback.format_exception(error, chain=False))
    from_worker = "Original Traceback" in str(error)  # then the message holds the traceback of a loader's process
    message = text.strip().splitlines()[-1].partition(": ")[2] if from_worker else one_sentence(str(error))
    if _NO_MEMORY.search(f"{type(error).__name__} {message}"):
        return f"the memory is too small ({message[:150]}): lower data.batch_size, or take a smaller net."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f", so that {error.filename} cannot be written" if error.filename else ""
        return f"the disk is full{place}: free some space. A run goes on with `project fit --resume DIR`."
    frames = _FRAME.findall(text)
    last, code = frames[-1][0::3] if frames else ("", "")
    if "jsonargparse" in last and error.__cause__ and (own := sentence(error.__cause__)) and own.endswith(_OWN):
        return own  # jsonargparse has wrapped the error of a class that it should make
    own_frames = [frame for frame in frames if not _LIBRARIES.search(frame[0])]
    is_plain = isinstance(error, ValueError | OSError | SyntaxError)
    if own_frames and not own_frames[-1][0].startswith(_PACKAGE) and not (is_plain and code.startswith("raise ")):
        file, line, function, _ = own_frames[-1]
        return f"{file}, line {line}, in {function}: {type(error).__name__}: {message} {_OWN}"
    return message if is_plain or (code.startswith("raise ") and _CHECKS.search(last)) else None
