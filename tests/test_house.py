"""Laws of the package's structure: few rooms, no circle, and a core that stands without the optional rooms."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "project"
TECHNIQUES = sorted(path.name for path in (PACKAGE / "compression").iterdir() if (path / "__init__.py").is_file())
ROOMS = [
    *(f"compression/{name}" for name in TECHNIQUES),
    "deployment/benchmark",
    "deployment/int8",
    "deployment/packed",
    "models/kernels",
    "tuning",
]
"""Folders that a fork may delete, one by one."""
WHOLE = ["compression", "deployment", "models/kernels", "tuning"]
"""All of them at once, with what they share."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> Iterator[str]:
    """Our modules that a file imports, inside functions too; not those for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield name


GRAPH = {name: set(imports_of(path)) - {name} for name, path in MODULES.items()}


def is_in(module: str, rooms: list[str]) -> bool:
    return any(f"{module}.".startswith(f"project.{room.replace('/', '.')}.") for room in rooms)


def test_the_package_has_at_most_twelve_entries():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 12, entries


def test_no_module_imports_itself_through_others():
    """Removes modules that import nothing that is left, until none is left."""
    left = {name: set(names) for name, names in GRAPH.items()}
    while free := [name for name, names in left.items() if not names]:
        for name in free:
            del left[name]
        for names in left.values():
            names.difference_update(free)
    assert not left, f"import circles among {sorted(left)}"


def test_the_core_imports_no_optional_room():
    arrows = [f"{a} -> {b}" for a, names in GRAPH.items() if not is_in(a, WHOLE) for b in names if is_in(b, WHOLE)]
    assert not arrows


def test_no_compression_callback_imports_another():
    callbacks = {name for name in MODULES if "compression" in name and name.rpartition(".")[2].endswith("callback")}
    assert len(callbacks) >= 6
    others = {name: GRAPH[name] & callbacks for name in callbacks}
    assert {name: names for name, names in others.items() if names and "low_bit" not in name} == {}
    assert others["project.compression.low_bit.xnor_callback"] <= {"project.compression.low_bit.ternary_callback"}


def with_all_that_needs(room: str) -> list[str]:
    """A room, and every optional room with an arrow to it, directly or through others."""
    gone = [room]
    while True:
        more = [
            other
            for other in ROOMS
            if other not in gone
            and any(is_in(a, [other]) and any(is_in(b, gone) for b in names) for a, names in GRAPH.items())
        ]
        if not more:
            return gone
        gone += more


VERBS = {"deployment": "export", "deployment/benchmark": "benchmark", "tuning": "tune"}
CLASSES = {
    "compression/low_bit": "TernaryWeights",
    "compression/low_rank": "LowRank",
    "compression/pruning": "IterativeMagnitudePruning",
    "compression/qat": "QuantizationAwareTraining",
    "compression/weight_sharing": "WeightSharing",
    "compression/winograd": "WinogradConvolutions",
    "deployment/int8": "PostTrainingQuantization",
    "deployment/packed": "Packing",
}


MAIN = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in f"{finder}".lower()]
from project.__main__ import main
main()
"""
"""The command line of the copy. An editable installation would find in the original what the copy lacks."""


@pytest.mark.parametrize(
    "rooms",
    [
        pytest.param(WHOLE, id="all"),
        *(pytest.param(with_all_that_needs(room), id=room, marks=pytest.mark.slow) for room in ROOMS),
    ],
)
def test_the_rest_works_without(rooms, tmp_path):
    """In a copy of the package: fit, the run's test, the help; and one sentence for what was taken out."""
    copy = tmp_path / "copy"
    shutil.copytree(PACKAGE, copy / "project", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", copy / "configs")
    for room in rooms:
        shutil.rmtree(copy / "project" / room)
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PROJECT_LOGS_DIR": str(tmp_path / "logs"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", MAIN, *args]
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)

    digits = ["--config=configs/digits.yaml", "--model.net.width=0.25", "--trainer.max_epochs=1"]
    for args in (["fit", *digits], ["test", "--run", str(tmp_path / "logs/digits")], ["--help"]):
        done = run(*args)
        assert done.returncode == 0, done.stderr
    for room in rooms:
        if room in VERBS:
            assert VERBS[room] not in run("--help").stdout
            done = run(VERBS[room], *digits)
        elif room in CLASSES:
            done = run("fit", *digits, f"--trainer.callbacks+=project.callbacks.{CLASSES[room]}")
        else:
            continue
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        assert (VERBS | CLASSES)[room] in done.stderr
