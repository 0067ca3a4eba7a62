"""README.md and docs/*.md say what is true of commands and files: every command runs, every file named is there.

A document's commands run in its order, in a working directory of their own, on small data (:func:`small_data`), with
options that cut training and timing short (:func:`shorter`). Commands are lines of ```bash blocks, and what begins with
``project`` or ``python scripts/`` in indented or inline code, unless it has a placeholder (``RUN``, ``…``) or ends with
an option that lacks its value.
"""

import argparse
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.small_data import write_small_data

import project
from project.frame.rooms import optional

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = project.__name__
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {
    "sudo": "changes the system",
    "python -m venv": "continuous integration makes an environment (.ci/run)",
    ". .venv/bin/activate": "belongs to the environment that continuous integration makes",
    "git": "needs a repository of one's own",
}
"""Beginnings of commands that are not run here, and why. Of pip, pytest, make and sbatch the arguments are checked."""
PARSED = {
    "any_net.py": "tests/test_any_net_table.py runs it",
    "benchmark_training.py": "a ratio of speeds needs long runs",
    "benchmark_winograd.py": "minutes; it has a kernel's layers at full size",
    "compare_unit_criteria.py": "tests/scripts/test_compare_unit_criteria.py runs it",
    "compare_unit_pruners.py": "tests/scripts/test_compare_unit_pruners.py runs it",
    "kill_and_resume.py": "tests/scripts/test_kill_and_resume.py runs it",
    "rename.py": "tests/scripts/test_rename.py runs it, in a copy",
    "units_of_nets.py": "tests/compression/thinning/test_common_nets.py looks at some of its nets",
}
"""Scripts whose options are parsed and no more, and why; those in scripts/studies take up to an hour each."""
SHORTER = {
    "run_seeds.py": ["--seeds=0", "--", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"],
    "benchmark_startup.py": ["--rounds=1"],
    "benchmark_kernels.py": ["--rounds=1"],
    "benchmark_pruning.py": ["--steps=2"],
    "fuzz.py": ["--inputs=20"],
}
"""Options of the scripts that run."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


CODE = re.compile(r"^```(\w*)\n(.*?)^```$|^ {4}(\S[^\n]*)$|`([^`]+)`", re.MULTILINE | re.DOTALL)
PARTIAL = re.compile(r"…|\.\.\.|<\w+>|\b[A-Z]{2,}\b(?!=)| --(?!help$)[\w.]+$")
"""A placeholder, or an option without its value at the end."""
NAMED = re.compile(rf"(?<![\w/.-])(?:configs|scripts|docs|tests|{PACKAGE}|\.ci)/[\w./-]*\w")
FILE = re.compile(r"```(?:python|yaml)\n# (my[\w.]*)\n(.*?)```", re.DOTALL)


def commands_of(text: str) -> list[str]:
    """The commands of a document, in its order."""
    commands = []
    for language, block, indented, inline in CODE.findall(text):
        lines = (
            block.replace("\\\n", " ").splitlines() if language == "bash" else [indented or " ".join(inline.split())]
        )
        for line in lines:
            for part in re.split(r"&&|^#.*|\s#.*", line):
                part = " ".join(part.split())
                is_one = re.match(rf"{PACKAGE} \S+ .*--|python scripts/", part) and not PARTIAL.search(part)
                if part and (is_one or language == "bash"):
                    commands.append(part)
    return commands


def test_commands_are_found():
    text = """Text with `project test --run logs/digits`, `project export` and `project fit --config
configs/a.yaml --trainer.max_epochs 1`, `project benchmark --run RUN`, `project fit --resume`.

```bash
NPROC=2 scripts/a.sh x --y  # a comment
cd a && project fit --config b.yaml \\
    --model.net.width 2
```

```python
project = 1
```

    project predict --images … --run x
    python scripts/a.py --seeds 0
"""
    assert commands_of(text) == [
        "project test --run logs/digits",
        "project fit --config configs/a.yaml --trainer.max_epochs 1",
        "NPROC=2 scripts/a.sh x --y",
        "cd a",
        "project fit --config b.yaml --model.net.width 2",
        "python scripts/a.py --seeds 0",
    ]


def test_the_readme_shows_the_main_job():
    assert "project fit --config configs/digits.yaml" in commands_of(DOCUMENTS[0].read_text())


def test_the_readme_is_short():
    assert len(DOCUMENTS[0].read_text().splitlines()) <= 200


# -- what a document names --------------------------------------------------------------------------------------------


def anchors_of(text: str) -> set[str]:
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_and_files_named_are_there(path):
    text = path.read_text()
    for name in set(NAMED.findall(text)):
        assert (ROOT / name).exists(), f"{path.name} names {name}"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), f"{path.name} links to {link}"
            assert not anchor or anchor in anchors_of(target.read_text()), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_classes_and_modules_named_are_there(path):
    for name in set(re.findall(rf"(?<![\w./-]){PACKAGE}\.[a-z_]+(?:\.\w+)*", path.read_text())):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_marks_of_rooms_come_in_pairs(path):
    """Those that scripts/rename.py reads: one on the first line, for the whole page, and regions that do not nest."""
    text = path.read_text()
    assert not [code for code in re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL) if "room: " in code]
    marks = re.findall(r"^<!-- (/?)room", text, re.MULTILINE)
    whole_page = [""] if text.startswith("<!-- room") else []
    assert marks == whole_page + ["", "/"] * (len(marks) // 2)


def test_the_index_of_docs_is_whole():
    text = (ROOT / "docs/README.md").read_text()
    names = [str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS[1:]]
    studies = [name for name in names if name.startswith("studies/") and name != "studies/README.md"]
    assert [name for name in names if name not in ("README.md", *studies) and f"]({name})" not in text] == []


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A data folder: 720 training and 100 test images in the place of Fashion-MNIST and MNIST, easy to tell apart."""
    root = tmp_path_factory.mktemp("data")
    write_small_data(root, 720, 100)
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch, small_data, logs):
    """The working directory: configurations, scripts, a photo, and a folder of photos for each of two classes."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROJECT_DATA_DIR", str(small_data))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    Image.new("L", (20, 20), 200).save(tmp_path / "photo.png")
    for name, shade in (("cat", 60), ("dog", 190)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(100):
            Image.new("L", (20, 16 + number % 4), shade + number % 30).save(tmp_path / f"photos/{name}/{number}.png")
    return tmp_path


def write_files(text: str, folder: Path, monkeypatch) -> list[str]:
    """Write the files ``my_*`` that a document shows; a module of such a name is imported anew in each test."""
    files = FILE.findall(text)
    for name, content in files:
        (folder / name).write_text(content)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    return [name for name, _ in files]


def shorter(args: list[str]) -> list[str]:
    """Options that cut a verb's work short."""
    line = " ".join(args)
    if "--help" in args or "--model" in args or args[0] in ("predict", "test", "validate", "export"):
        return []
    if args[0] == "benchmark":
        options = {"--engines": ["eager", "onnxruntime"], "--rounds": ["1"], "--memory": ["false"]}
        return [word for option, values in options.items() if option not in args for word in (option, *values)]
    if args[0].startswith("find_"):
        return ["--num_steps=20"] if args[0] == "find_lr" else ["--largest=64"]
    options = ["--trainer.limit_train_batches=1", "--data.batch_size=32", "--trainer.observe=false"]
    if not re.search(r"--resume|max_epochs|begin_epoch|pruning|low_rank|rounds|deep_compression|deploy_fast", line):
        options += ["--trainer.max_epochs=1"]
    if re.search("deep_compression|deploy_fast", line):
        options += ["--trainer.callbacks.IterativeMagnitudePruning.epochs_per_round=1"]
    if "deep_compression" in line:
        options += ["--trainer.callbacks.WeightSharing.latency=false"]
        options += ["--trainer.callbacks.WeightSharing.sharer.num_images=32"]
    return [*options, "--trials=1", "--workers=1"] if args[0] == "tune" else options


def run(line: str, command: Callable[..., tuple[int, str, str]]) -> None:
    """Run one command of a document, or check what can be checked of it."""
    if any(f"{line} ".startswith(f"{start} ") for start in ELSEWHERE):
        return
    words = shlex.split(line)
    with pytest.MonkeyPatch.context() as patch:
        while re.match(r"[A-Z_]+=", words[0]):
            patch.setenv(*words.pop(0).split("=", 1))
        match words:
            case ["project", *args] if "--trainer.devices" in args:
                in_a_process([Path(sys.executable).with_name("project"), *args, *shorter(args)])
            case ["project", *args]:
                status, out, err = command(*args, *shorter(args))
                if "openvino" in args and not find_spec("openvino"):
                    assert status == 2 and "pip install openvino" in err, err
                elif "which this copy of the package does not have" not in err:
                    assert status == 0 and out, err
            case ["python", script, *args] if script.startswith("scripts/"):
                run_script(Path(script), args, patch)
            case [script, *args] if script.startswith("scripts/"):
                patch.setenv("PYTHON", sys.executable)
                in_a_process(["bash", script, *args, *shorter(["fit"])])
            case ["sbatch", script, _, *args]:
                assert Path(script).is_file()
                assert command("fit", *args, "--print_config")[0] == 0
            case ["tensorboard", *args]:
                in_a_process([sys.executable, "-m", "tensorboard.main", "--inspect", *args])
            case ["qemu-x86_64", *args]:
                run(shlex.join(args[args.index("project") :]), command)
            case ["make", *_]:
                in_a_process(["make", "-n", "-C", ROOT, *words[1:]])
            case ["pip", "install", *args]:
                assert set(re.findall(r"\.\[(\w+)\]", " ".join(args))) <= set(extras())
            case ["pytest", *args]:
                assert all((ROOT / arg).is_file() for arg in args if arg.startswith("tests/"))
            case _:
                pytest.fail(f"nothing here knows how to run {line}")


def extras() -> dict[str, list[str]]:
    """The package's optional dependencies."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # renaming leaves this line
    return metadata["optional-dependencies"]


def in_a_process(words: list) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_script(script: Path, args: list[str], patch: pytest.MonkeyPatch) -> None:
    """In this process; of a script in :data:`PARSED` only up to the end of its options."""

    def parse(parser: argparse.ArgumentParser, *rest: list[str]) -> None:
        _, unknown = parser.parse_known_args(*rest)
        if unknown:
            parser.error(f"unknown options {unknown}")
        sys.exit(0)

    if script.name in PARSED or script.parent.name == "studies":
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
    patch.setattr("sys.argv", [script.name, *args, *SHORTER.get(script.name, [])])
    patch.setattr("sys.path", [*sys.path])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as exit_:
        assert not exit_.code, f"it ends with {exit_.code}"
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def brief_timing(monkeypatch):
    """Clocks look at one image once."""

    def time_ms(engine, images):
        start = time.perf_counter()
        engine(images[:1])
        return 1000 * (time.perf_counter() - start)

    if latency := optional("deployment.latency"):
        monkeypatch.setattr(latency, "_time_ms", time_ms)


def assumed_runs(text: str) -> list[str]:
    """Experiments that a document looks at before it trains them, if it does."""
    found = []
    for name in ("digits", "fashion_mnist"):
        commands = commands_of(text)
        looked = [i for i, line in enumerate(commands) if f"logs/{name}" in line]
        trained = [
            i for i, line in enumerate(commands) if re.search(rf"project fit --config configs/{name}\.yaml", line)
        ]
        if looked and looked[0] < min(trained, default=len(commands)):
            found.append(name)
    return found


@pytest.fixture(scope="session")
def kept_runs() -> dict[str, Path]:
    """The runs that documents assume, which the first test that needs them trains."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_runs(path, command, folder, logs, brief_timing, kept_runs, tmp_path_factory, monkeypatch):
    text = path.read_text()
    write_files(text, folder, monkeypatch)
    for name in assumed_runs(text):
        if name not in kept_runs:
            run(f"project fit --config configs/{name}.yaml", command)
            kept_runs[name] = Path(shutil.copytree(logs / name, tmp_path_factory.mktemp("runs") / name))
        else:
            shutil.copytree(kept_runs[name], logs / name)
    for line in dict.fromkeys(commands_of(text)):  # a command that is there twice runs once
        try:
            run(line, command)
        except Exception as error:
            error.add_note(f"{path.name}: {line}")
            raise


@pytest.mark.parametrize(
    "line",
    [
        "project fit --config configs/digits.yaml --trainer.max_epohcs 1",
        "project fit --config configs/digit.yaml",
        "project fit --config configs/digits.yaml --config configs/compression/prunning.yaml",
        "project exports --run logs/digits",
        "python scripts/studies/lottery_ticket.py --seads 0",
        "python scripts/run_seed.py --config configs/digits.yaml",
        "make checks",
        "pip install -e '.[opnvino]'",
        "pytest tests/test_hose.py",
        "sbatch scripts/train_slurm.sbatch mine --config configs/digits.yaml --trainer.sync_batchnrom true",
        "cargo run",
    ],
)
def test_a_mistake_in_a_command_fails(line, command, folder):
    with pytest.raises((AssertionError, OSError, pytest.fail.Exception)):
        run(line, command)


# -- files of one's own -----------------------------------------------------------------------------------------------

OWN = ROOT / "docs/your_own_parts.md"


def test_classes_of_ones_own_in_the_working_directory(command, folder, logs, monkeypatch):
    """A net, a data set, an augmentation and a loss, as the guide has them, are found by class path."""
    from project.frame.paths import Run

    files = write_files(OWN.read_text(), folder, monkeypatch)
    assert {"my.yaml", "my_net.py", "my_data.py", "my_augmentation.py", "my_loss.py"} <= set(files)
    lines = [line for line in commands_of(OWN.read_text()) if re.search(r"my\.yaml|logs/my\b", line)]
    assert [line.split()[1] for line in lines[:2]] == ["fit", "predict"]
    for line, options in ((lines[0], ["--trainer.observe=false"]), (lines[1], [])):
        status, _, err = command(*shlex.split(line)[1:], *options)
        assert status == 0, f"{line}\n{err}"
    run = Run.find(logs / "my")
    assert run.predictions.is_file()
    assert json.loads(run.summary.read_text())["test/accuracy"] > 0.8
    for name in ("my_net.MyNet", "my_data.EvenOrOdd", "my_augmentation.Darken", "my_loss.FocalLoss"):
        assert name in run.config.read_text()


@pytest.mark.slow
def test_further_processes_find_classes_of_ones_own(folder, logs, monkeypatch):
    """Those of DDP, of the loader and of a search, started by the console script, which Python gives no such path."""
    write_files(OWN.read_text(), folder, monkeypatch)
    (folder / "space.yaml").write_text("space: {model.net.init_args.width: [8, 16]}\nsampler: grid\nworkers: 2\n")
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--data.num_workers=1"]
    small = ["--trainer.max_epochs=1", "--trainer.observe=false"]
    script = Path(sys.executable).with_name("project")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for args in (
        ["fit", "--config=my.yaml", *ddp, *small],
        ["tune", "--config=my.yaml", "--config=space.yaml", *small],
    ):
        done = subprocess.run(
            [script, *args], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "test accuracy" in done.stdout or "2 of 2 trials done" in done.stdout
