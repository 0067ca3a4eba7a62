"""Laws of the package's structure: few rooms, no circle, and a core that stands without the optional rooms."""

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from house import ROOT, WHOLE, House

import project

PACKAGE = ROOT / Path(project.__file__).resolve().parent.name
HOUSE = House(PACKAGE)
MODULES, GRAPH, ROOMS = HOUSE.modules, HOUSE.imports, HOUSE.rooms
WHOLE_ROOMS = [room for room in WHOLE if (PACKAGE / room).is_dir()]


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
    arrows = [
        f"{a} -> {b}" for a, names in GRAPH.items() if not HOUSE.is_in(a, WHOLE) for b in names if HOUSE.is_in(b, WHOLE)
    ]
    assert not arrows


def code_lines(path: Path) -> int:
    """Lines of a file that hold code: neither blank nor a comment nor a docstring."""
    source = path.read_text(encoding="utf-8")
    texts = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    text_lines = {line for node in texts for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in empty]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - text_lines)


def test_the_core_is_small():
    lines = {name: code_lines(path) for name, path in MODULES.items() if not HOUSE.is_in(name, WHOLE)}
    assert 3000 < sum(lines.values()) <= 5000, sorted(lines.items(), key=lambda item: -item[1])


def test_no_compression_callback_imports_another():
    """But XNOR-Net's, which is a subclass of that for ternary weights in the same folder."""
    callbacks = {name for name in MODULES if "compression" in name and name.rpartition(".")[2].endswith("callback")}
    arrows = {(name, other) for name in callbacks for other in GRAPH[name] & callbacks}
    folder = "project.compression.low_bit"
    assert arrows <= {(f"{folder}.xnor_callback", f"{folder}.ternary_callback")}


VERBS = {"deployment": "export", "deployment/benchmark": "benchmark", "tuning": "tune"}
CLASSES = {
    "compression/distillation": "DistillFrom",
    "compression/low_bit": "TernaryWeights",
    "compression/low_rank": "LowRank",
    "compression/pruning": "IterativeMagnitudePruning",
    "compression/qat": "QuantizationAwareTraining",
    "compression/weight_sharing": "WeightSharing",
    "compression/winograd": "WinogradConvolutions",
    "deployment/int8": "PostTrainingQuantization",
    "deployment/packed": "Packing",
    "metrics/probes": "LandscapeProbe",
}
NETS = {"models/zoo": "LeNet5"}


MAIN = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in f"{finder}".lower()]
from project.__main__ import main
main()
"""
"""The command line of the copy. An editable installation would find in the original what the copy lacks."""
IMPORT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in f"{finder}".lower()]
from project.models import SmallInception
print(sum(name.partition(".")[0] == "project" for name in sys.modules))
"""
"""Prints how many modules of the copy are loaded with a net."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "rooms",
    [
        pytest.param(WHOLE_ROOMS, id="all"),
        *(pytest.param(HOUSE.with_all_that_need([room]), id=room) for room in ROOMS),
    ],
)
def test_the_rest_works_without(rooms, tmp_path):
    """In a copy of the package: fit, and one sentence for what was taken out; without all rooms the run's test, too."""
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
    verbs = [["fit", *digits], ["test", "--run", str(tmp_path / "logs/digits")], ["--help"]]
    for args in verbs if rooms == WHOLE_ROOMS else verbs[:1]:
        done = run(*args)
        assert done.returncode == 0, done.stderr
    if rooms == WHOLE_ROOMS:
        done = subprocess.run([sys.executable, "-c", IMPORT], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and int(done.stdout) <= 12, done.stderr
    for room in rooms:
        if room in VERBS:
            assert VERBS[room] not in run("--help").stdout
            done = run(VERBS[room], *digits)
        elif room in NETS:
            former = run("fit", *digits, f"--model.net=project.models.lenet.{NETS[room]}")
            assert "this copy of the package does not have project.models.zoo" in former.stderr
            done = run("fit", *digits, f"--model.net=project.models.{NETS[room]}")
        elif room in CLASSES:
            done = run("fit", *digits, f"--trainer.callbacks+=project.callbacks.{CLASSES[room]}")
        else:
            continue
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        assert (VERBS | CLASSES | NETS)[room] in done.stderr
