"""The argument parser: errors in one sentence, with the nearest right key."""

import difflib
import importlib
import inspect
import re
import sys
from argparse import SUPPRESS, ArgumentError, ArgumentParser
from collections.abc import Iterable
from enum import Enum
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from jsonargparse._paths import change_to_path_dir
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import Path, load_config_path_context
from lightning.pytorch.cli import LightningArgumentParser

from project.frame.yaml_text import read_yaml
from project.models.signature import left_to_code, takes_any

yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
_UNKNOWN = (
    re.compile(r"class_path '(?P<path>[\w.]+)':\s+Option '(?P<key>[\w.]+)' is not accepted"),
    re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<key>\w+)'"),
    re.compile(r"Group '(?P<group>[\w.]*)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Subcommand '(?P<verb>\w+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"[Uu]nrecognized arguments: --(?P<key>[\w.]+)"),
)
_NO_MODULE = re.compile(r"No module named '(\w+)'")
_NO_ROOM = re.compile(rf"No module named '({__name__.partition('.')[0]}\.[\w.]+)'")
_BULLET = re.compile(r"^\s*- ", re.MULTILINE)
_OTHER_KINDS = ("Expected a <class 'NoneType'>", "Expected a path but")
_NESTED = ("Does not validate against any of the Union subtypes", "Not a valid subclass of")
"""Branches that only say that the branches below them failed."""
_BELOW = re.compile(r"Does not validate against any of the Union subtypes\s+Subtypes:.*Errors:\s*$|(?<=:)$", re.DOTALL)
"""The end of a branch whose reason is in the next branch."""
_KEYS = re.compile(r'Parser key "([\w.]+)":\s*')
_PROBLEM = re.compile(r"Problem with given class_path '([\w.]+)':\s*")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with errors of one or two lines.

    Abbreviated options are refused, so a typo in an option and the same typo in YAML get the same answer.
    """

    _takes_any = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_net_arguments(self, key: str) -> None:
        """Let the data give arguments of the net at ``key``. The option ``net_arguments`` says which."""
        self.add_argument(
            "--net_arguments",
            type=dict[str, str | None] | None,
            default=None,
            help="Argument of the net -> the value of the data that it gets: num_classes, image_shape, num_channels, "
            "height or width; null gives it none. Arguments named num_classes and image_shape get theirs unasked.",
        )
        self.take_any_arguments_of(key)

    def take_any_arguments_of(self, key: str) -> None:
        """Require no argument of the net at ``key``, and accept any name if the net has ``**kwargs``."""
        action = next(action for action in self._actions if action.dest == key)
        action.sub_add_kwargs |= {"of_net": True, "fail_untyped": False}  # type: ignore[attr-defined]

    def add_class_arguments(self, theclass: Any, *args: Any, of_net: bool = False, **kwargs: Any) -> list[str]:
        added = super().add_class_arguments(theclass, *args, **kwargs)
        self._ask_no_more_than_data(theclass, of_net)
        return added

    def add_function_arguments(self, function: Any, *args: Any, of_net: bool = False, **kwargs: Any) -> list[str]:
        added = super().add_function_arguments(function, *args, **kwargs)
        self._ask_no_more_than_data(function, of_net)
        return added

    def _ask_no_more_than_data(self, maker: Any, of_net: bool) -> None:
        """Require none of the net's arguments yet, because the data may give it. Accept any name for ``**kwargs``."""
        if not of_net:
            return
        left_out = left_to_code(maker)
        for action in self._actions:
            action.required = False
            if action.dest in left_out:
                action.default = SUPPRESS
        self._takes_any = takes_any(maker)

    def name_items_of(self, key: str) -> None:
        """Let ``--KEY.CLASS.argument`` set an argument of the one object of this class in the list at ``key``.

        Without a class, ``--KEY.argument`` sets an argument of the last object: jsonargparse does this.
        """
        action = next(action for action in self._actions if action.dest == key)
        action.__class__ = _NamedItems

    def parse_object(self, cfg_obj: Any, *args: Any, **kwargs: Any) -> Namespace:
        self._learn(dict(cfg_obj or {}))
        return super().parse_object(cfg_obj, *args, **kwargs)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """As jsonargparse does it, which reads in the locale's encoding and names no file in its errors."""
        text, file = read_yaml(path), Path(path, mode="fr")
        with load_config_path_context(file), change_to_path_dir(file):
            return self.parse_string(text, str(path), *args, **kwargs)

    def parse_args(self, args: Any = None, *further: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        if self._takes_any:
            self._learn(arg.removeprefix("--").partition("=")[0] for arg in args or ())
        return super().parse_args(args, *further, **kwargs)

    def _learn(self, names: Iterable[str]) -> None:
        """Add an argument for each name that only the ``**kwargs`` of a net accept."""
        known = {action.dest for action in self._actions}
        for name in names if self._takes_any else ():
            if name not in known:
                self.add_argument(f"--{name}", type=Any, default=SUPPRESS)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        hint = f" Did you mean {near!r}?" if (near := self._nearest(message)) else ""
        if (absent := _NO_MODULE.search(message)) is not None:
            hint = f" Run the command in the folder that holds {absent[1]}.py, or install {absent[1]}."
        if "does not correspond to a subclass of Module" in message:
            hint = " A function that makes a net must say `-> torch.nn.Module`."
        sentence = _NO_ROOM.sub(r"this copy of the package does not have \1", one_sentence(message).rstrip("."))
        stop = "" if sentence.endswith("?") else "."
        sys.stderr.write(f"error: {sentence}{stop}{hint} (--help lists all options)\n")
        sys.exit(2)

    def _nearest(self, message: str) -> str | None:
        """The known key that is most similar to the unknown key in ``message``."""
        match = next((match for pattern in _UNKNOWN if (match := pattern.search(message))), None)
        if match is None:
            return None
        found = match.groupdict()
        if "path" in found:
            return _closest(found["key"], _parameters(found["path"]))
        if "module" in found:
            return _closest(found["key"], dir(importlib.import_module(found["module"])))
        parser = self._verb(found["verb"]) if "verb" in found else self
        prefix = f"{found['group']}." if found.get("group") else ""
        options = [action.dest for action in parser._actions if action.dest]
        return _closest(found["key"], [key[len(prefix) :] for key in options if key.startswith(prefix)])

    def _verb(self, name: str) -> ArgumentParser:
        """The parser of a subcommand."""
        parsers = (getattr(action, "_name_parser_map", {}) for action in self._actions)
        return next((found[name] for found in parsers if name in found), self)


class _NamedItems(ActionTypeHint):
    """jsonargparse's action of a list of objects, whose options may name the object by its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 4:
            return super().__call__(*args, **kwargs)
        parser, config, value, option = args
        given = config.get(self.dest) or []
        items = given if isinstance(given, list) else [given]
        kinds = [item.class_path.rpartition(".")[2] for item in items]
        name, _, rest = option.removeprefix(f"--{self.dest}.").partition(".")
        if not rest or not (name in kinds or name[:1].isupper()):
            return super().__call__(*args)
        if kinds.count(name) != 1:
            remedy = "leave one out" if name in kinds else "correct the name, or add one before this option"
            found = f"but the list holds {', '.join(kinds) or 'nothing'}"
            raise ArgumentError(None, f"{option} needs exactly one {name} in {self.dest}, {found}: {remedy}")
        items.append(items.pop(kinds.index(name)))  # jsonargparse reaches the last one
        super().__call__(parser, config, value, f"--{self.dest}.{rest}")
        if isinstance(given, list):
            changed = config[self.dest]
            changed.insert(kinds.index(name), changed.pop())


def one_sentence(message: str) -> str:
    """One sentence for an error of jsonargparse, which is a tree of lines with a branch for each type of the value."""
    branches = [branch.strip() for branch in _BULLET.split(message)]
    head, tried = branches[0], [branch for branch in branches[1:] if not branch.startswith(_OTHER_KINDS)]
    tried = [branch for branch in tried if not branch.startswith(_NESTED)] or tried
    if tried[1:] and not tried[0].endswith(":"):  # the value is no list, so what is wrong with it as an object counts
        tried = [branch for branch in tried if branch != "Expected a <class 'list'>"] or tried
    keys = _KEYS.findall(head)
    last = next((number for number, branch in enumerate(tried) if not _BELOW.search(branch)), len(tried) - 1)
    reason = " ".join(_BELOW.sub("", branch) for branch in tried[: last + 1])
    head = reason.split("Given value type:")[0] if tried else _KEYS.sub("", head, count=1)
    head = _PROBLEM.sub(r"\1: ", _KEYS.sub(r"\1: ", head))
    head = re.sub(r"<class '([\w.]+)'>", r"\1", head)
    return " ".join((f"{keys[0]}: {head}" if keys else head).split())


def _closest(key: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.6)), None)


def _parameters(class_path: str) -> list[str]:
    """The names of all keyword arguments of a class and of its base classes."""
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
