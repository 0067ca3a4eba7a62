"""A resume that cannot end in the bits of a run never stopped says so in one line; environment.json keeps a list."""

import copy
import json
import shutil

import pytest

from project.frame.environment import changes, describe_environment
from project.frame.paths import Run

LINE = "This resume cannot end in the bits of a run that never stopped"


def lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if LINE in line]


@pytest.fixture
def run(command, digits, logs) -> Run:
    """A run of one epoch."""
    status, _, err = command("fit", *digits, "--trainer.max_epochs=1", "--trainer.test_after_fit=false")
    assert status == 0, err
    return Run.find(logs / "digits")


def change(run: Run, **values: object) -> None:
    """Write other values into environment.json; ``None`` takes a key out."""
    environment = json.loads(run.environment.read_text()) | values
    run.environment.write_text(json.dumps({key: value for key, value in environment.items() if value is not None}))


def resume(command, run: Run, *options: str) -> str:
    status, out, err = command("fit", "--resume", str(run.folder), "--trainer.max_epochs=2", *options)
    assert status == 0, err
    return out


def test_on_the_same_machine_there_is_no_line(command, run):
    first = json.loads(run.environment.read_text())
    assert "resumes" not in first and first["precision"] == "32-true" and first["device"] == "cpu"
    assert lines(resume(command, run)) == []
    assert lines(resume(command, run, "--trainer.max_epochs=3")) == []
    after = json.loads(run.environment.read_text())
    resumes = after.pop("resumes")
    assert after == first and len(resumes) == 2
    assert [found["kernels"] for found in resumes] == [first["kernels"]] * 2
    assert list(run.folder.glob(".*environment*")) == []


@pytest.mark.slow
def test_kernels_and_precision_are_named(command, run):
    if not json.loads(run.environment.read_text())["kernels"]["on"]:
        pytest.skip("there are no kernels here")
    first = json.loads(run.environment.read_text())
    (line,) = lines(resume(command, run, "--trainer.kernels=off", "--trainer.precision=bf16-mixed"))
    assert line == f"{LINE}: precision was 32-true, is bf16-mixed; kernels was on, is off."
    after = json.loads(run.environment.read_text())
    assert after["kernels"] == first["kernels"] and after["resumes"][0]["kernels"]["on"] is False
    assert after["resumes"][0]["precision"] == "bf16-mixed"


def test_threads_processor_and_torch_are_named(command, run):
    packages = json.loads(run.environment.read_text())["packages"]
    now = describe_environment()
    change(run, num_threads=64, cpu="Abacus", cpu_abilities="no AVX2", packages=packages | {"torch": "1.0"})
    (line,) = lines(resume(command, run))
    assert f"num_threads was 64, is {now['num_threads']}" in line
    assert f"processor was Abacus (no AVX2), is {now['cpu']}" in line
    assert f"torch was 1.0, is {packages['torch']}" in line
    assert "kernels" not in line and "precision" not in line


def test_a_checkpoint_of_a_run_counts_like_the_run(command, digits, run, logs):
    change(run, num_threads=64)
    options = [*digits, "--trainer.max_epochs=2", "--ckpt_path", str(run.last_checkpoint)]
    status, out, err = command("fit", *options, "--trainer.test_after_fit=false")
    assert status == 0, err
    assert len(lines(out)) == 1
    new = Run.find(logs / "digits")
    assert new.number == 1 and "resumes" not in json.loads(new.environment.read_text())
    assert "resumes" not in json.loads(run.environment.read_text())


@pytest.mark.slow
def test_a_checkpoint_outside_of_a_run_has_no_environment(command, digits, run, tmp_path):
    shutil.copy(run.last_checkpoint, tmp_path / "some.ckpt")
    status, out, err = command("fit", *digits, "--trainer.max_epochs=2", f"--ckpt_path={tmp_path / 'some.ckpt'}")
    assert status == 0 and lines(out) == [], err


@pytest.mark.slow
def test_an_older_run_gives_no_false_alarm(command, run):
    change(run, kernels=None, precision=None, device=None)
    assert lines(resume(command, run, "--trainer.kernels=off")) == []
    assert len(json.loads(run.environment.read_text())["resumes"]) == 1
    run.environment.unlink()
    assert lines(resume(command, run, "--trainer.max_epochs=3")) == []
    assert "resumes" not in json.loads(run.environment.read_text())


def test_a_run_that_begins_again_is_described_anew(command, run):
    """Without a checkpoint nothing of the first start is left."""
    change(run, num_threads=64)
    shutil.rmtree(run.checkpoints)
    assert lines(resume(command, run)) == []
    environment = json.loads(run.environment.read_text())
    assert "resumes" not in environment and environment["num_threads"] != 64


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("kernels", {"on": False}, ["kernels was on, is off"]),
        ("kernels", {"on": True, "built": [], "used": ["max_pool"]}, []),
        ("num_threads", 3, ["num_threads was 2, is 3"]),
        ("precision", "16-mixed", ["precision was 32-true, is 16-mixed"]),
        ("packages", {"torch": "3.0", "numpy": "1"}, ["torch was 2.0, is 3.0"]),
        ("packages", {}, []),
        ("git_commit", "abc", []),
        ("device", "NVIDIA", ["processor was A (b), is NVIDIA"]),
    ],
)
def test_what_changes_the_bits(key, value, found):
    was = {
        **{"kernels": {"on": True, "built": ["float32"], "used": []}, "num_threads": 2, "precision": "32-true"},
        **{"device": "cpu", "cpu": "A", "cpu_abilities": "b", "packages": {"torch": "2.0"}},
    }
    now = copy.deepcopy(was) | {key: value}
    assert changes(was, now) == found
    assert changes(was, was) == changes({}, now) == changes(was, {}) == []


def test_on_a_graphics_card_the_processor_does_not_matter():
    was = {"device": "NVIDIA", "num_threads": 2, "kernels": {"on": True}, "cpu": "A", "packages": {"torch": "2.0"}}
    assert changes(was, was | {"num_threads": 3, "kernels": {"on": False}, "cpu": "B"}) == []
