"""Makes a fork your own: gives the package another name, or takes out rooms that you do not want.

    python scripts/rename.py acme
    python scripts/rename.py --without tuning deployment/packed

The first renames the package, its command, and the words for both in documentation, configurations, scripts and tests.
Run it once, in a fresh clone. Runs and packed files that were made under the old name are read under the new one. The
second deletes folders of the package with their tests, configurations, scripts, dependencies and lines of the
documentation; rooms that build on a deleted one go with it. Both ask for a clean git working tree, and both change
nothing if they refuse. ``git checkout . && rm -r acme`` undoes the first, ``git checkout .`` the second. Afterwards
install and test the fork: ``pip install -e '.[dev]' && pytest``.
"""

import argparse
import keyword
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml
from house import ROOT, WHOLE, House

VERBS = "fit|validate|test|predict|export|benchmark|tune|find_lr|find_batch_size|unpack|my_verbs"
MARK = "renaming leaves this line"


def patterns(old: str) -> list[re.Pattern[str]]:
    """Where the name of the package stands for the package or its command, and is no English word."""
    return [
        re.compile(text.format(old=old, verbs=VERBS), re.MULTILINE)
        for text in (
            r"(?<![\w-]){old}(?=\.[A-Za-z_*{{<])",  # project.models, project.{{room}}
            r"(?<![\w-]){old}(?=/)",  # project/models
            r"(?<=from ){old}(?= import)",
            r"(?<=import ){old}\b(?!\.)",
            r"(?<=-m ){old}\b",
            r"(?<=[\"']){old}(?=[\"'*])",
            r"(?<=`){old}\b",
            r"(?<=[\"']){old}(?=\.[\"'])",  # "project."
            r"(?<=usage: ){old}\b",
            r"(?<=[\"']# ){old}\b",
            r"\b{old}(?= (?:{verbs}|--help)\b)",
            r"\b{old}(?= \{{)",
            r"(?<=^# ){old}(?=: )",
            r"(?<=--job-name=){old}\b",
            r"(?<=cache/){old}\b",
            r"^{old}(?= = \")",  # the command, in pyproject.toml
        )
    ]


def renamed(text: str, old: str, new: str) -> str:
    """A file's text with the new name of the package.

    Args:
        text: text of the file.
        old: present name of the package.
        new: name that takes its place.
    """
    found = patterns(old)
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if MARK in line or line.startswith(f"[{old}"):  # [project.scripts] is TOML's own word
            continue
        for pattern in found:
            line = pattern.sub(new, line)
        lines[i] = line
    return "\n".join(lines)


def text_files(root: Path) -> list[Path]:
    """The text files that git knows, and those that it would add."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [root / name for name in names if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def name_of(root: Path) -> str:
    """The package's present name, from pyproject.toml."""
    return str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"])


def check_clean(root: Path) -> None:
    done = subprocess.run(["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{root} is not a git repository, so a change could not be undone: run `git init`, and commit first.")
    if done.stdout.strip():
        sys.exit("The working tree has changes that are not committed: commit or stash them first.")


def check_name(name: str, old: str, root: Path) -> None:
    """Ends the script if a package cannot have this name here."""
    if old != "project":
        sys.exit(f"This copy is called {old} already. The script renames a fresh clone, whose package is `project`.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        nearest = re.sub(r"\W+", "_", name.strip().lower()).strip("_0123456789")
        hint = f", such as {nearest}" if nearest else ""
        sys.exit(f"NAME is {name!r}: choose lower-case letters, digits and underscores, with a letter first{hint}.")
    if keyword.iskeyword(name) or name == old or (root / name).exists():
        sys.exit(f"NAME is {name!r}, which stands for something else here: choose another.")
    if find_spec(name) is not None:
        sys.exit(f"NAME is {name!r}, but Python finds a package of this name already: choose another.")
    dependencies = re.findall(r'^ +"([\w-]+)', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if name in {dependency.replace("-", "_").lower() for dependency in (*dependencies, "sklearn", "yaml", "numpy")}:
        sys.exit(f"NAME is {name!r}, which is a package that this one needs: choose another.")


def rename(root: Path, name: str) -> int:
    """Renames the package; returns the number of files that changed.

    Args:
        root: root of the repository.
        name: new name of the package and its command.
    """
    old = name_of(root)
    check_name(name, old, root)
    check_clean(root)
    changed = {}
    for path in text_files(root):
        if path == root / "scripts/rename.py":
            continue  # its words are about the name before
        text = path.read_text(encoding="utf-8")
        if path == root / old / "__init__.py":
            text = text.replace("_FORMER_PACKAGES: tuple[str, ...] = ()", f'_FORMER_PACKAGES = ("{old}",)  # {MARK}')
        if (new := renamed(text, old, name)) != path.read_text(encoding="utf-8"):
            changed[path] = new
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    (root / old).rename(root / name)
    return len(changed)


# -- rooms ------------------------------------------------------------------------------------------------------------


def remove(root: Path, rooms: Sequence[str]) -> list[str]:
    """Takes rooms out of the package; returns them with those that build on them.

    Args:
        root: root of the repository.
        rooms: folders below the package, such as ``"tuning"`` or ``"compression/qat"``.
    """
    house = House(root / name_of(root))
    known = sorted({*house.rooms, *(room for room in WHOLE if (house.package / room).is_dir())})
    for room in rooms:
        if room.strip("/") not in known:
            sys.exit(f"ROOM is {room!r}, which this copy does not have: choose among {', '.join(known)}.")
    check_clean(root)
    gone = house.with_all_that_need([room.strip("/") for room in rooms])
    names = gone_names(house, gone)
    files = [path for path in text_files(root) if not house.is_in(house_name(root, path), gone)]
    deleted = [path for path in files if goes(root, path, house, gone, names)]
    pages = {path.name for path in deleted if path.suffix == ".md"}
    changed = {}
    for path in files:
        if path in deleted:
            continue
        text = new = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            new = without_lines(text, gone, pages)
        elif path.name == "pyproject.toml":
            new = without_dependencies(text, house.package.name, gone)
        if new != text:
            changed[path] = new
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    for path in deleted:
        path.unlink()
    for room in gone:
        for folder in (house.package / room, root / "tests" / room):
            shutil.rmtree(folder, ignore_errors=True)
    return gone


def house_name(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def gone_names(house: House, gone: Sequence[str]) -> set[str]:
    """Class paths that configurations use for what goes: those of the tables of names in the rooms' ``__init__.py``."""
    names = set()
    for room in ("callbacks", "compression", "data", "deployment", "losses", "metrics/probes", "models", "tuning"):
        path = house.package / room / "__init__.py"
        if path.is_file():
            for name, home in re.findall(r'"(\w+)": "([\w.]+)"', path.read_text(encoding="utf-8")):
                if house.is_in(home, gone):  # a callback has its name in project.callbacks too
                    names |= {
                        f"{house.package.name}.{folder.replace('/', '.')}.{name}" for folder in (room, "callbacks")
                    }
    return names


def goes(root: Path, path: Path, house: House, gone: Sequence[str], names: set[str]) -> bool:
    """Whether a file outside the package has no use without the rooms."""
    place = path.relative_to(root)
    if any(place.is_relative_to(Path("tests") / room) for room in gone):
        return True
    imported = scripts_of(root, path) if place.parts[0] in ("scripts", "tests") and path.suffix == ".py" else []
    if any(goes(root, script, house, gone, names) for script in imported):
        return True
    if place.parts[0] == "scripts" and path.suffix == ".py":
        return any(house.is_in(module, gone) for module in house.imports_of(path, late=False))
    if place.parts[0] == "configs" and path.suffix == ".yaml":
        if "tuning" in gone and "tune" in place.parts:
            return True
        return bool(names & set(class_paths(yaml.safe_load(path.read_text(encoding="utf-8")))))
    if place.parts[0] == "docs" and path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        first = re.match(r"<!-- room: ([\w/, ]+) -->\n", text)
        return first is not None and names_a_room(first[1], gone)
    return False


def scripts_of(root: Path, path: Path) -> list[Path]:
    """The scripts that a Python file imports when it is loaded."""
    names = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    folders = [root / "scripts", root / "scripts/studies"]
    return [script for name in names for folder in folders if (script := folder / f"{name}.py").is_file()]


def class_paths(value: object) -> list[str]:
    """All texts within nested plain values."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in class_paths(item)]
    if isinstance(value, list):
        return [text for item in value for text in class_paths(item)]
    return [value] if isinstance(value, str) else []


def names_a_room(words: str, gone: Sequence[str]) -> bool:
    rooms = [room.strip() for room in words.split(",")]
    return any(room == other or room.startswith(f"{other}/") for room in rooms for other in gone)


def without_lines(text: str, gone: Sequence[str], pages: set[str]) -> str:
    """A Markdown page without what it says about the rooms.

    That is what stands between ``<!-- room: NAME -->`` and ``<!-- /room -->``, each line that ends with
    ``<!-- room: NAME -->``, the lines of a map that begin with a room's folder, and list items and table rows that link
    to a deleted page.

    Args:
        text: text of the page.
        gone: rooms that are taken out.
        pages: file names of the pages that are deleted.
    """
    lines, kept, skipping = text.split("\n"), [], False
    for line in lines:
        mark = re.search(r"<!-- room: ([\w/, ]+) -->\s*$", line)
        if skipping or (mark and names_a_room(mark[1], gone)):
            whole_line = mark is not None and line.strip() != mark[0].strip()
            skipping = "<!-- /room -->" not in line and (skipping or not whole_line)
            continue
        folder = re.match(r" *([\w/]+)/ ", line)
        if folder and any(room == folder[1] or room.endswith(f"/{folder[1]}") for room in gone):
            continue
        if re.match(r"\s*([-*|]|\d+\.)", line) and any(f"{page})" in line for page in pages):
            continue
        kept.append(line)
    return "\n".join(kept)


def without_dependencies(text: str, package: str, gone: Sequence[str]) -> str:
    """pyproject.toml without the groups of dependencies, each below a comment with its folder, that the rooms need."""
    kept, skipping = [], False
    for line in text.split("\n"):
        if group := re.fullmatch(rf" *# {package}/(\S+)", line):
            skipping = any(group[1] == room or group[1].startswith(f"{room}/") for room in gone)
        elif not line.startswith(" "):
            skipping = False
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", nargs="?", help="new name of the package and of its command")
    parser.add_argument("--without", metavar="ROOM", nargs="+", default=[], help="folders of the package to take out")
    args = parser.parse_args()
    if bool(args.name) == bool(args.without):
        sys.exit("Give either NAME or --without ROOM: one thing at a time.")
    if args.name:
        print(f"{rename(ROOT, args.name)} files renamed. Next: pip install -e '.[dev]' && pytest")  # noqa: T201
    else:
        print(f"Taken out: {', '.join(remove(ROOT, args.without))}. Next: pip install -e '.[dev]' && pytest")  # noqa: T201


if __name__ == "__main__":
    main()
