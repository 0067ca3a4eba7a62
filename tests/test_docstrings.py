"""Laws of the public docstrings: each argument is a whole phrase, and each class has an example that runs."""

import ast
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from project.frame.rooms import MissingRoomError, optional

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    *("callbacks", "compression", "data", "frame", "deployment", "learning", "losses", "metrics", "models", "tuning"),
    "metrics.probes",
]
FRAGMENT = re.compile(
    r"(of|likewise|in|from|for|to|as|with|by|at|on|and|or|that|which|whose|what|who|see|same|ditto)\b", re.IGNORECASE
)
"""How no phrase begins that says what an argument is."""
RANGE = re.compile(r"\d|\b(positive|any|none|seed)\b", re.IGNORECASE)
"""What the phrase of a number has: its range."""


def exported() -> dict[str, Any]:
    """The public classes and functions by their dotted name: what the rooms export."""
    found = {}
    for room in ROOMS:
        module = optional(room)  # a fork may have taken it out
        for name in getattr(module, "__all__", []):
            try:
                value = getattr(module, name)
            except MissingRoomError:  # a fork may have taken its room out
                continue
            if callable(value) and value.__module__.startswith("project.") and hasattr(value, "__qualname__"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


EXPORTED = exported()
CLASSES = {name: value for name, value in EXPORTED.items() if inspect.isclass(value)}


def section(docstring: str | None, title: str) -> str:
    """What stands, indented, below a line of the docstring."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    if title not in lines:
        return ""
    rest = lines[lines.index(title) + 1 :]
    end = next((i for i, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    return textwrap.dedent("\n".join(rest[:end])).strip("\n")


def arguments(docstring: str | None) -> dict[str, str]:
    """The phrase of each argument under ``Args``."""
    entries = re.split(r"^(?=\*{0,2}\w[\w, *]*: )", section(docstring, "Args:"), flags=re.MULTILINE)
    phrases = {}
    for entry in entries:
        names, colon, phrase = entry.partition(": ")
        if colon:
            phrases |= dict.fromkeys(re.split(r",\s*", names.replace("*", "")), " ".join(phrase.split()))
    return phrases


def faults_of_phrase(phrase: str, is_number: bool) -> Iterator[str]:
    if len(phrase.split()) < 4:
        yield "has fewer than four words"
    if not phrase.endswith((".", ".)", ".``")):
        yield "does not end with a full stop"
    if FRAGMENT.match(phrase):
        yield "begins like a fragment"
    if is_number and not RANGE.search(phrase):
        yield "is a number's and gives no range"


def constructor_of(cls: type) -> tuple[Callable[..., Any], str | None]:
    """What makes an object, and the docstring of the class that defines it; none if that class is not ours."""
    if getattr(cls, "_is_protocol", False):  # nothing makes an object of it; its __init__ is typing's
        return cls, None
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return owner.__init__, owner.__doc__ if owner.__module__.startswith("project.") else None  # type: ignore[misc]


def documented(name: str) -> Iterator[tuple[str, Callable[..., Any], str | None]]:
    """The callables of one public name: the function, or the constructor and the public methods of its own."""
    value = EXPORTED[name]
    if not inspect.isclass(value):
        yield name, value, value.__doc__
        return
    make, docstring = constructor_of(value)
    if docstring is not None:
        yield name, make, docstring
    foreign = {key for base in value.__mro__[1:] if not base.__module__.startswith("project.") for key in vars(base)}
    for key, method in vars(value).items():
        function = method.__func__ if isinstance(method, classmethod | staticmethod) else method
        if inspect.isfunction(function) and not key.startswith("_") and key not in foreign:
            yield f"{name}.{key}", function, function.__doc__


def faults_of_arguments(name: str) -> Iterator[str]:
    for where, function, docstring in documented(name):
        phrases = arguments(docstring)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in ("self", "cls") or parameter.name.startswith("_"):
                continue
            if parameter.name not in phrases:
                yield f"{where}: {parameter.name} is not described"
                continue
            is_number = parameter.annotation in (int, float, "int", "float")
            for fault in faults_of_phrase(phrases[parameter.name], is_number):
                yield f"{where}: the phrase of {parameter.name} {fault}"


def test_every_public_argument_is_a_whole_phrase():
    """Counts the exceptions: 0."""
    assert len(EXPORTED) > 90
    assert [fault for name in EXPORTED for fault in faults_of_arguments(name)] == []


def test_every_phrase_below_args_is_whole():
    """Also of functions and classes that no room exports."""
    faults = []
    for path in sorted((ROOT / "project").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                for argument, phrase in arguments(ast.get_docstring(node)).items():
                    faults += [
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: the phrase of {argument} {fault}"
                        for fault in faults_of_phrase(phrase, is_number=False)
                    ]
    assert faults == []


def test_every_public_class_has_an_example():
    """Counts the exceptions: 0."""
    lacking = [name for name, cls in CLASSES.items() if not section(cls.__doc__, "Example::")]
    assert lacking == []


WITH_EXAMPLE = sorted(name for name, cls in CLASSES.items() if section(cls.__doc__, "Example::"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_runs(name, tmp_path, monkeypatch):
    """Python is run as a doctest. YAML is added to the digits run, which must then have an object of this class."""
    example = section(CLASSES[name].__doc__, "Example::")
    monkeypatch.setenv("PROJECT_LOGS_DIR", str(tmp_path))
    if example.startswith(">>>"):
        monkeypatch.chdir(tmp_path)  # for the files that it writes
        test = doctest.DocTestParser().get_doctest(example, {}, name, None, None)
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.attempted and not result.failed
        return
    assert isinstance(yaml.safe_load(example), dict)
    (tmp_path / "example.yaml").write_text(example)
    assert any(type(made) is CLASSES[name] for made in objects_made_by(tmp_path / "example.yaml"))


def objects_made_by(fragment: Path) -> list[Any]:
    """Every object of ours that the command line makes for the digits run with the fragment."""
    from project.frame.cli import CLI

    made: list[Any] = []
    cli = CLI([f"--config={ROOT / 'configs/digits.yaml'}", f"--config={fragment}"], run=False)
    waiting: list[Any] = [cli.model, cli.datamodule, cli.trainer, *cli.trainer.callbacks]
    waiting.append(cli.model.make_optimizer(cli.model.parameter_groups()))  # YAML gives a callable that makes it
    while waiting:
        value = waiting.pop()
        if any(value is other for other in made) or not type(value).__module__.startswith(("project.", "torch.nn")):
            continue
        made.append(value)
        parts = [*vars(value).values(), *getattr(value, "_modules", {}).values()]
        waiting += [part for item in parts for part in (item if isinstance(item, list | tuple) else [item])]
    return made
