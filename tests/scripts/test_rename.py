"""A fork has a name of its own, reads what was made under the old one, and keeps the rooms that it wants."""

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import rename
from house import ROOT, House

import project

PACKAGE = project.__name__
NAMES = ("project",)  # renaming leaves this line
FORKED = pytest.mark.skipif(PACKAGE not in NAMES, reason="this copy has been renamed already")


@pytest.fixture
def clone(tmp_path):
    """The working tree in a repository of its own, as committed."""
    folder = tmp_path / "clone"
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=all")


def script(folder, *arguments):
    command = [sys.executable, "scripts/rename.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


WITHOUT_EDITABLE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]; "
    "sys.argv[0] = '{name}'; from {name}.__main__ import main; main()"
)
"""An editable installation would find in the original what the copy lacks."""


def run(folder, name, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_EDITABLE.format(name=name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("My-Net", "such as my_net"),
        ("3d", "with a letter first, such as d"),
        ("class", "something else"),
        ("tests", "something else"),
        ("project", "something else"),
        ("json", "finds a package"),
        ("torch", "finds a package"),
    ],
)
@FORKED
def test_a_bad_name_is_refused(name, word):
    with pytest.raises(SystemExit, match=word):
        rename.check_name(name, "project", ROOT)


@FORKED
def test_uncommitted_work_and_a_missing_room_are_refused(clone):
    assert "which this copy does not have: choose among" in script(clone, "--without", "tune").stderr
    assert "one thing at a time" in script(clone).stderr
    (clone / "README.md").write_text("changed")
    for arguments in (["acme"], ["--without", "tuning"]):
        assert "commit or stash" in script(clone, *arguments).stderr
    assert (clone / "README.md").read_text() == "changed" and git(clone, "status", "--porcelain") == " M README.md\n"


@FORKED
@pytest.mark.slow
def test_a_renamed_copy_reads_what_was_made_before(clone, command, digits, logs, tmp_path):
    """A run with a thinned net, its packed file; and files that the renamed copy packs are read here."""
    units = ["--config", str(ROOT / "configs/compression/unit_pruning.yaml"), "--trainer.max_epochs=1"]
    schedule = [f"--trainer.callbacks.schedule.init_args.{key}" for key in ("begin_epoch=0", "end_epoch=0.5")]
    status, _, err = command("fit", *digits, *units, *schedule, "--trainer.callbacks.report=false")
    assert status == 0, err
    made = logs / "digits/version_0"
    status, _, err = command("export", "--run", str(made), "--format", "packed")
    assert status == 0, err
    before = (made / "model.packed").read_bytes()

    done = script(clone, "acme")
    assert done.returncode == 0, done.stderr
    commit(clone)
    again = script(clone, "emca")
    assert again.returncode == 1 and "is called acme already" in again.stderr
    assert not (clone / "project").exists() and git(clone, "status", "--porcelain") == ""

    assert "usage: acme" in run(clone, "acme", "--help").stdout
    done = run(clone, "acme", "test", "--run", made)
    assert done.returncode == 0, done.stderr
    done = run(clone, "acme", "test", "--model", made / "model.packed", "--config", "configs/digits.yaml")
    assert done.returncode == 0, done.stderr
    done = run(clone, "acme", "export", "--run", made, "--format", "packed")
    assert done.returncode == 0, done.stderr
    assert (made / "model.packed").read_bytes() == before
    assert "project" not in re.sub(r"PROJECT_\w+", "", run(clone, "acme", "fit", "--help").stdout)


@FORKED
def test_no_line_names_the_package_after_a_renaming(clone):
    """Save for a few that mean something else."""
    done = script(clone, "acme")
    assert done.returncode == 0, done.stderr
    assert '\nacme = "acme.__main__:main"\n' in (clone / "pyproject.toml").read_text()
    code = re.compile(r"\bproject\.[a-z_]+\.[A-Za-z_]|from project|import project|[\"']project[\"']|\bproject/\w")
    left = [
        f"{path.relative_to(clone)}: {line.strip()}"
        for path in rename.text_files(clone)
        for line in path.read_text(encoding="utf-8").splitlines()
        if code.search(line) and rename.MARK not in line and path.name not in ("rename.py", "test_rename.py")
    ]
    assert left == []


@FORKED
@pytest.mark.slow
@pytest.mark.parametrize("rooms", [["tuning"], ["compression", "deployment", "models/kernels", "tuning"]])
def test_a_copy_without_rooms_has_nothing_that_needs_them(rooms, clone, logs):
    """Their folders, tests, configurations, dependencies are gone; what is left passes its laws and trains."""
    done = script(clone, "--without", *rooms)
    assert done.returncode == 0, done.stderr
    assert not any((clone / PACKAGE / room).exists() or (clone / "tests" / room).exists() for room in rooms)
    assert "optuna" not in (clone / "pyproject.toml").read_text()
    assert not (clone / "configs/tune").exists() or not list((clone / "configs/tune").iterdir())
    commit(clone)
    done = run(clone, PACKAGE, "fit", "--config=configs/digits.yaml", "--trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    tests = ["test_house.py", "test_configs.py", "test_docs.py", "test_docstrings.py"]
    tests += ["learning", "frame/test_cli.py", "callbacks/test_checkpoint.py"] if len(rooms) > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n2",
            *(f"tests/{name}" for name in tests if (clone / "tests" / name).exists()),
        ],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_scripts_and_tests_go_with_a_script_that_they_import():
    house, names = House(ROOT / PACKAGE), ("any_net", "any_net_cells", "any_net_page")
    files = [*(ROOT / f"scripts/{name}.py" for name in names), ROOT / "tests/test_any_net_table.py"]
    there = [path for path in files if path.is_file()]  # a fork may have taken them out
    for room in ("compression", "deployment"):
        if (ROOT / PACKAGE / room).is_dir():
            assert all(rename.goes(ROOT, path, house, [room], set()) for path in there)
    assert not rename.goes(ROOT, Path(__file__), house, ["compression"], set())


def test_a_region_a_line_and_a_link_of_a_room_leave_a_page():
    page = """# Page
<!-- room: tuning -->
## Search

`project tune` searches.
<!-- /room -->
| a | b |
| search | `project tune` | <!-- room: tuning, deployment/packed -->
| prune | `project fit` | <!-- room: compression/pruning -->
- [search](search.md)
- [train](train.md)
```
project/
  tuning/      the search
  data/        data sets
```"""
    left = rename.without_lines(page, ["tuning"], {"search.md"})
    assert left == "\n".join(
        [
            "# Page",
            "| a | b |",
            "| prune | `project fit` | <!-- room: compression/pruning -->",
            "- [train](train.md)",
            "```",
            "project/",
            "  data/        data sets",
            "```",
        ]
    )


def test_the_dictionary_of_packed_files_stays():
    """Its bytes are part of the format: with others, older files would be read as garbage."""
    pytest.importorskip(f"{PACKAGE}.deployment.packed")
    from project.deployment.packed.packing import _DICTIONARY

    assert (len(_DICTIONARY), zlib.crc32(_DICTIONARY)) == (20460, 767648597)
