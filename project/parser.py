"""The argument parser: errors in one sentence, with the nearest right key."""

import difflib
import importlib
import inspect
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

_GROUP = re.compile(r"Group '(?P<group>[\w.]*)' does not accept option '(?P<key>[\w.]+)'")
_CLASS = re.compile(r"class_path '(?P<path>[\w.]+)':\s+Option '(?P<key>[\w.]+)' is not accepted")
_FLAG = re.compile(r"[Uu]nrecognized arguments: --(?P<key>[\w.]+)")
_OTHER = re.compile(r"(?:Option|[Kk]ey) ['\"](?P<key>[\w.]+)['\"] is not (?:accepted|expected|found)")


class Parser(LightningArgumentParser):
    """LightningCLI's parser whose errors fit on a line or two.

    Abbreviated options are refused: a typo in an option and the same typo in YAML get the same answer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        if not self.exit_on_error:
            super().error(message, ex)
        sentence = " ".join(message.split())
        near = self._nearest(message)
        hint = f" Did you mean {near!r}?" if near else ""
        sys.stderr.write(f"error: {sentence.rstrip('.')}.{hint} (--help lists all options)\n")
        sys.exit(2)

    def _nearest(self, message: str) -> str | None:
        """The known key that is most like the one that ``message`` complains of."""
        if match := _CLASS.search(message):
            known = _parameters(match["path"])
            return _closest(match["key"], known)
        for pattern in (_GROUP, _FLAG, _OTHER):
            if match := pattern.search(message):
                key, group = match["key"], match.groupdict().get("group") or ""
                return _closest(key, self._keys_in(group)) or _closest(key, self._keys_in(None))
        return None

    def _keys_in(self, group: str | None) -> list[str]:
        """Options below ``group``; all options in full, for ``None``."""
        options = [action.dest for action in self._actions if action.dest]
        if group is None:
            return options
        prefix = f"{group}." if group else ""
        below = [option[len(prefix) :] for option in options if option.startswith(prefix)]
        return sorted({option.split(".")[0] for option in below if option})


def _closest(key: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.6)), None)


def _parameters(class_path: str) -> list[str]:
    """Names of all keyword arguments of a class and its bases."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    classes = inspect.getmro(kind) if inspect.isclass(kind) else (kind,)
    names: set[str] = set()
    for one in classes:
        function = one.__init__ if inspect.isclass(one) else one
        try:
            names |= set(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            continue
    return sorted(names - {"self", "args", "kwargs"})
