"""What the user is told of an error: one sentence if the user can mend it, otherwise it is a bug of the package."""

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
_ELSEWHERE = "choose another folder with --trainer.logs_dir DIR, or another file with --output FILE."
_CIRCUMSTANCES = {
    "out of memory|can't allocate memory|Unable to allocate|MemoryError": "the memory is too small ({}): lower "
    "data.batch_size, or take a smaller net.",
    "DataLoader worker .*(killed by signal|exited unexpectedly)|DataLoader (ConnectionReset|EOF|BrokenPipe)Error": "a "
    "process that reads images was killed ({}), "
    "perhaps because the memory is too small: lower data.num_workers or data.batch_size.",
    "Too many open files|items of ancdata": "too many files are open ({}): raise the limit (ulimit -n), or lower "
    "data.num_workers.",
    "No space left on device|Disk quota exceeded": "the disk is full ({}): free some space, then go on with "
    f"`project fit --resume DIR`; or {_ELSEWHERE}",
    "Read-only file system|Permission denied": f"a file cannot be opened ({{}}): {_ELSEWHERE}",
}
"""What may be wrong with the machine, whatever kind of exception tells it: a pattern of its text, and the answer."""


def sentence(error: BaseException) -> str | None:
    """The sentence for an error that the user can mend; ``None`` for a bug of the package.

    The user can mend a ``ValueError``, an ``OSError``, too little memory, an error that a check of Lightning, of an
    optimizer or of a loader has raised, and any error of a file that belongs neither to the package nor to a library.
    For such a file the sentence names the line.

    Args:
        error: exception that has ended the command, with its traceback.
    """
    told: BaseException | None = error
    while told is not None:  # Lightning may have met a further error while it ended the run
        message = _message(told)
        for pattern, answer in _CIRCUMSTANCES.items():
            if re.search(pattern, f"{_place(told)} {type(told).__name__} {message}"):
                return answer.format(message[:200].rstrip(". "))
        told = None if isinstance(told, ValueError | OSError) else told.__context__
    text, message = "".join(traceback.format_exception(error, chain=False)), _message(error)
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


def _place(error: BaseException) -> str:
    """``DataLoader`` if the loader has raised the error."""
    return (
        "DataLoader" if any("torch/utils/data" in frame for frame in traceback.format_tb(error.__traceback__)) else ""
    )


def _message(error: BaseException) -> str:
    """An exception's text as one sentence; of an error in a loader's process the last line, after its traceback."""
    text = str(error)
    return text.strip().splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else one_sentence(text)
