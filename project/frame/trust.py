"""Runs that somebody else has made: what their configurations and checkpoints may name, and where they may write.

A run of one's own is known by its ``config.yaml``: ``fit`` keeps the checksum of this file in the cache folder. Such a
run may name any class, and writes where it wrote before. Any other run may name classes of this package, torch,
torchvision, torchmetrics and Lightning, and of the packages that the user names with ``--trust``; no other module is
imported. It writes into its own folder only: its loggers, and the places that its configuration names, are left out.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

import project
from project.frame.paths import Paths, Run
from project.frame.yaml_text import read_yaml

log = logging.getLogger(__name__)

OF_A_RUN = ("seed_everything", "trainer", "model", "net_arguments", "data")
"""The keys of a run's configuration. All others are options of one verb."""
trusted: list[str] = []
"""The packages and modules that the user of this process trusts by name."""
_PLACES = ("data_dir", "default_root_dir", "dirpath", "exclude_batches_path", "filename", "logs_dir", "model_registry")
"""Arguments that say where something is written."""
_WRITERS = ("logger", "profiler")
_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
_PACKAGES = "|".join((project.__name__, *project._FORMER_PACKAGES))
_KNOWN = re.compile(
    rf"({_PACKAGES}|torch(metrics|\.nn|\.optim|vision\.models|vision\.ops)"
    r"|(lightning\.(pytorch|fabric)|pytorch_lightning)\.(accelerators|callbacks|cli|plugins|strategies))"
    r"(\.[a-z]\w*)*\.[A-Za-z]\w*"
)
"""Names that need no trust. A method needs it: ``load_from_checkpoint`` could be told to unpickle a file."""


class UntrustedError(ValueError):
    """Something names code that the user does not trust.

    Example::

        >>> from project.frame.trust import UntrustedError, check_trusted
        >>> try:
        ...     check_trusted({"class_path": "os.system"}, "config.yaml")
        ... except UntrustedError as error:
        ...     print(error)
        config.yaml needs os.system, which is neither of this package nor trusted: name the package that ...
    """


def is_own(config: Path) -> bool:
    """Whether this user has made the run of a ``config.yaml``, and nobody has changed the file since then."""
    return config.is_file() and _mark(config).is_file()


def remember(config: Path) -> None:
    """Note that a run is this user's own. If the cache folder cannot be written, it counts as somebody else's.

    Args:
        config: path of the run's ``config.yaml``.
    """
    with suppress(OSError):
        _mark(config).parent.mkdir(parents=True, exist_ok=True)
        _mark(config).touch()


def configuration(run: Run) -> str:
    """The configuration of a run: the path of its ``config.yaml``, or for the run of somebody else a safe YAML text.

    Raises:
        ValueError: if it names code that is not trusted, or if a link in the folder leads out of it.
    """
    if is_own(run.config):
        return str(run.config)
    found = yaml.safe_load(read_yaml(run.config))
    values = {key: found[key] for key in OF_A_RUN if found.get(key) is not None}
    left_out: set[str] = set()
    for part in [part for part in _parts(values, set()) if isinstance(part, dict)]:
        for key in [key for key in part if key in _PLACES or (key in _WRITERS and not isinstance(part[key], bool))]:
            left_out |= {key} if part.pop(key) is not None else set()
            part |= {key: str(run.checkpoints)} if key == "dirpath" else {}
    if isinstance(trainer := values.get("trainer"), dict):
        trainer["default_root_dir"] = str(run.folder)
    check_trusted(values, str(run.config))
    for path in run.folder.rglob("*"):
        if not path.resolve().is_relative_to(run.folder.resolve()):
            raise ValueError(f"{path} is a link that leads out of the run's folder: replace it by a copy of the file.")
    if left_out:
        log.warning("You have not made %s: its %s count for nothing.", run.folder, ", ".join(sorted(left_out)))
    return str(yaml.safe_dump(values))


def check_trusted(values: Any, source: str) -> None:
    """Refuse plain values that name code which is neither known nor trusted. Nothing is imported.

    Args:
        values: plain values, in any nested lists and mappings.
        source: name of the file that holds the values, for the error message.

    Raises:
        UntrustedError: if there is such a name.
        ValueError: if a text holds further values.
    """
    texts = [part for part in _parts(values, set()) if isinstance(part, str)]
    names = {name for text in texts for name in _NAME.findall(text) if not _KNOWN.fullmatch(name)}
    allowed = tuple(f"{name}." for name in trusted)
    asked = sorted(name for name in names if not name.startswith(allowed) and find_spec(name.partition(".")[0]))
    if text := next(filter(_is_nested, texts), None):
        raise ValueError(f"{source} has values within the text {text!r}: write them into {source} itself.")
    if asked:
        packages = ",".join(dict.fromkeys(name.rpartition(".")[0] for name in asked))
        raise UntrustedError(
            f"{source} needs {', '.join(asked)}, which is neither of this package nor trusted: name the package that "
            f"holds it with --trust {packages}, if you trust it."
        )


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """All mappings, lists and texts in nested values, each once."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        yield value
        for item in (*value, *(value.values() if isinstance(value, dict) else ())):
            yield from _parts(item, seen)


def _is_nested(text: str) -> bool:
    """Whether a text holds values or names a file of values, which the parser would read."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        text = Path(text).read_text(encoding="utf-8") if Path(text).is_file() else text
        return isinstance(yaml.safe_load(text), dict | list) or ('"' in text and "\\" in text)
    return False


def _mark(config: Path) -> Path:
    """The file in the cache folder that says that a configuration is this user's own."""
    return Paths().cache / "runs" / sha256(config.read_bytes()).hexdigest()
