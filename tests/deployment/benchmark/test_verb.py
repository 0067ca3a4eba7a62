"""``project benchmark``: what it writes, that its numbers agree with other verbs' and with files, what it refuses."""

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project.compression.thinning.units import plan_thinning, units_of
from project.deployment.benchmark.subjects import _names, load_subjects
from project.deployment.engines import FP32, available
from project.deployment.export import export_onnx
from project.frame.paths import Run
from project.models import Classifier

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--rounds", "2", "--memory", "false")
NOT_COMPILED = [name for name in available() if "compiled" not in name]
WITH_ONNX = ("--engines", "eager", "onnxruntime")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on digits, with an exported model beside the checkpoints. Tests take copies of it."""
    from conftest import ROOT, TINY

    from project.frame.cli import CLI

    logs = tmp_path_factory.mktemp("trained")
    options = ["--trainer.max_epochs=1", "--trainer.precision=32-true", f"--trainer.logs_dir={logs}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["project"])
        CLI(["fit", "--config", str(ROOT / "configs/digits.yaml"), *TINY, *options])
    run = Run.find(logs / "digits")
    export_onnx(load(run).net, run.folder / "model.onnx", (1, 8, 8))
    return run.folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(trained, tmp_path / "digits" / "version_0")))


def load(run: Run) -> Classifier:
    return Classifier.load_from_checkpoint(run.weights(), map_location="cpu", weights_only=True)


def read(run: Run) -> list[dict[str, str]]:
    with run.benchmark("csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(run: Run, command: Command, *options: str) -> list[dict[str, str]]:
    status, _, err = command("benchmark", "--run", str(run.folder), *QUICK, *options)
    assert status == 0, err
    return read(run)


@pytest.mark.slow
def test_every_engine_is_measured(command: Command, run: Run, tmp_path: Path) -> None:
    rows = rows_of(run, command, "--engines", *NOT_COMPILED)
    on_file = [name for name in ("onnxruntime", "openvino") if name in NOT_COMPILED]
    expected = [(name, "") for name in NOT_COMPILED] + [(name, "model.onnx") for name in on_file]
    assert [(row["engine"], row["file"]) for row in rows] == expected
    accuracy = json.loads(run.summary.read_text())["test/accuracy"]
    net = load(run).net
    for row in rows:
        exact = row["engine"] in FP32
        assert float(row["test_accuracy"]) == pytest.approx(accuracy, abs=1e-6 if exact else 0.02)
        assert row["num_images"] == "359" and row["num_rounds"] == "2" and row["num_threads"] == "1"
        assert int(row["num_parameters"]) == sum(parameter.numel() for parameter in net.parameters())
        for batch in ("batch1", "batch64"):
            p05, median, p95 = (float(row[f"latency_ms_{batch}{end}"]) for end in ("_p05", "", "_p95"))
            assert 0 < p05 <= median <= p95
        assert float(row["images_per_second"]) == pytest.approx(64000 / float(row["latency_ms_batch64"]))
    for batch in ("batch1", "batch64"):
        reference = min(float(row[f"latency_ms_{batch}"]) for row in rows if row["engine"] in FP32 and not row["file"])
        for row in rows:
            assert float(row[f"speedup_{batch}"]) * float(row[f"latency_ms_{batch}"]) == pytest.approx(reference)
        assert 1.0 in [float(row[f"speedup_{batch}"]) for row in rows]
    num_bytes = {row["file"] or row["engine"]: int(row["file_bytes"]) for row in rows}
    torch.save(dict(net.state_dict()), tmp_path / "0.pt")
    assert num_bytes["eager"] == num_bytes["contiguous"] == (tmp_path / "0.pt").stat().st_size
    assert num_bytes["bf16"] < 0.8 * num_bytes["eager"]
    assert num_bytes["model.onnx"] == num_bytes["onnxruntime"] == (run.folder / "model.onnx").stat().st_size


def test_everything_is_written_and_shown(command: Command, run: Run) -> None:
    args = ("--run", str(run.folder), *QUICK, *WITH_ONNX, "--num_images", "70", "--threads", "1")
    status, out, err = command("benchmark", *args)
    assert status == 0, err
    assert "model.onnx, onnxruntime" in out and "speedup 64" in out and str(run.benchmark("md")) in out
    text = run.benchmark("md").read_text()
    for part in ("1 thread on", "torch ", "onnxruntime ", "- date: 20", "- rounds: 2,", "70 of the test set"):
        assert part in text
    assert f"`project benchmark --run {run.folder} --threads 1 --engines eager onnxruntime --num_images 70" in text
    assert text.count("\n| digits/version_0 | ") == 3
    assert {row["num_images"] for row in read(run)} == {"70"}
    assert run.benchmark("png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run.folder)).Reload()
    assert "benchmark/text_summary" in events.Tags()["tensors"] and "benchmark" in events.Tags()["images"]


def change(run: Run, name: str, change_: Callable[[dict[str, Any]], None]) -> Run:
    """A copy of the run under another name, without model file, with a changed checkpoint."""
    other = Run(Path(shutil.copytree(run.folder, run.folder.with_name(name), ignore=shutil.ignore_patterns("*.onnx"))))
    checkpoint = torch.load(other.best_checkpoint, weights_only=True)
    change_(checkpoint)
    torch.save(checkpoint, other.best_checkpoint)
    return other


@pytest.mark.slow
def test_runs_are_put_side_by_side(command: Command, run: Run) -> None:
    """The other run's net is of another structure, known from its checkpoint alone."""

    def thin(checkpoint: dict[str, Any]) -> None:
        module = load(run)
        layer = next(iter(units_of(module.net, module.image_shape)))
        module.operate_(plan_thinning(module.net, {layer: [0]}, module.image_shape))
        checkpoint.update(state_dict=module.state_dict(), surgeries=module.surgeries)

    other = change(run, "version_1", thin)
    rows = rows_of(run, command, "--engines", "eager", "contiguous", "--compare", str(other.folder), str(run.folder))
    assert [(row["run"], row["engine"]) for row in rows] == [
        ("digits/version_0", "eager"),
        ("digits/version_1", "eager"),
        ("digits/version_0", "contiguous"),
        ("digits/version_1", "contiguous"),
    ]
    for name in ("num_parameters", "macs", "file_bytes"):
        assert int(rows[1][name]) < int(rows[0][name])
    reference = min(float(row["latency_ms_batch1"]) for row in (rows[0], rows[2]))
    for row in rows:
        assert float(row["speedup_batch1"]) * float(row["latency_ms_batch1"]) == pytest.approx(reference)
    text = run.benchmark("md").read_text()
    assert "Benchmark of digits/version_0, digits/version_1" in text
    run.benchmark("csv").unlink()
    line = next(line for line in text.splitlines() if "how to repeat" in line)
    assert command(*line.split("`")[1].split()[1:])[0] == 0
    assert [list(row.items())[:8] for row in read(run)] == [list(row.items())[:8] for row in rows]


def test_another_checkpoint_of_the_run_leaves_its_model_files_out(run: Run) -> None:
    (best,), (last,) = load_subjects(run, run.weights()), load_subjects(run, run.last_checkpoint, files=False)
    assert [file.name for file in best.files] == ["model.onnx"] and not last.files


def test_an_engine_that_fails_is_a_row_that_says_why(
    command: Command, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nand a long account of it")

    monkeypatch.setattr(torch, "compile", no_compiler)
    status, out, err = command("benchmark", "--run", str(run.folder), *QUICK, "--engines", "compiled", "eager")
    assert status == 0, err
    reason = "not measured, RuntimeError: no C++ compiler was found"
    compiled, eager = read(run)
    assert compiled["remark"] == reason and not compiled["latency_ms_batch1"] and not compiled["test_accuracy"]
    assert float(eager["speedup_batch1"]) == 1
    assert (
        f"digits/version_0, compiled: {reason}\n" in out and f"compiled: {reason}." in run.benchmark("md").read_text()
    )
    status, _, err = command("benchmark", "--run", str(run.folder), *QUICK, "--engines", "compiled")
    assert status == 2 and "none of them runs this net" in err


@pytest.mark.slow
def test_memory_and_compiled(command: Command, run: Run) -> None:
    status, _, err = command("benchmark", "--run", str(run.folder), "--rounds", "2", "--engines", "eager", "compiled")
    assert status == 0, err
    eager, compiled = read(run)
    assert compiled["test_accuracy"] == eager["test_accuracy"] and not compiled["remark"]
    assert 1e6 < int(eager["peak_memory_bytes"]) < int(compiled["peak_memory_bytes"]) < 1e9


def remove_checkpoints(run: Run) -> None:
    shutil.rmtree(run.checkpoints)


def damage_the_model_file(run: Run) -> None:
    path = run.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-3000])


def fix_the_batch(run: Run) -> None:
    model = onnx.load(run.folder / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, run.folder / "model.onnx")


def make_runs_to_compare(run: Run) -> None:
    change(run, "of_letters", lambda checkpoint: checkpoint["hyper_parameters"].update(class_names=tuple("abcdefghij")))
    remove_checkpoints(change(run, "without", lambda checkpoint: None))
    change(run, "own_net", lambda checkpoint: checkpoint["hyper_parameters"].pop("net"))


MISTAKES: dict[str, tuple[Callable[[Run], None] | None, list[str], list[str]]] = {
    "no checkpoint": (remove_checkpoints, [], ["run is", "no checkpoint", "project fit"]),
    "unknown engine": (None, ["--engines", "tensorrt"], ["'tensorrt'", "eager, contiguous, bf16, compiled"]),
    "damaged model file": (damage_the_model_file, [], ["model.onnx", "ONNX Runtime cannot load it", "export it again"]),
    "model file of one batch size": (fix_the_batch, [], ["model.onnx", "N of 1 and 64", "dynamic batch"]),
    "other data": (
        make_runs_to_compare,
        ["--compare", "of_letters"],
        ["(a, b, c, …)", "(0, 1, 2, …)", "same data set"],
    ),
    "no checkpoint to compare": (make_runs_to_compare, ["--compare", "without"], ["compare is", "no checkpoint"]),
    "net unknown": (make_runs_to_compare, ["--compare", "own_net"], ["its net cannot be built from it"]),
    "no run to compare": (None, ["--compare", "nowhere"], ["'nowhere'", "no such folder"]),
    "no rounds": (None, ["--rounds", "0"], ["rounds is 0"]),
    "no images": (None, ["--num_images", "0"], ["num_images is 0"]),
    "no threads": (None, ["--threads", "0"], ["threads is 0"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence(name: str, command: Command, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, options, expected = MISTAKES[name]
    if prepare:
        prepare(run)
    monkeypatch.chdir(run.folder.parent)
    model_file = "model file" in name
    engines = [] if "--engines" in options else ["--engines", "onnxruntime" if model_file else "eager"]
    status, _, err = command("benchmark", "--run", str(run.folder), *QUICK, *engines, *options)
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1, err
    assert all(part in lines[0] for part in expected) and len(lines[0]) < 500, lines[0]
    assert not run.benchmark("csv").exists()


def test_without_a_run_it_refuses(command: Command, digits: list[str], run: Run) -> None:
    for options in ([], ["--ckpt_path", str(run.best_checkpoint)]):
        status, _, err = command("benchmark", *digits, *options)
        assert status == 2 and "--run DIR" in err and len(err.strip().splitlines()) == 1


def test_an_engine_that_is_not_installed_is_named(command: Command, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    status, _, err = command("benchmark", "--run", str(run.folder), *QUICK, "--engines", "eager", "openvino")
    assert status == 2 and "openvino cannot be imported: pip install openvino" in err


def test_names_tell_runs_apart() -> None:
    folders = [Path(f"/logs/{name}/digits/version_0") for name in "ab"]
    assert _names(folders[:1]) == ["digits/version_0"]
    assert _names(folders) == ["a/digits/version_0", "b/digits/version_0"]
