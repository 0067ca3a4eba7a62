"""Folders: what decides them, and that two runs never share one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from project.frame.paths import Paths, Run, write_whole


def test_argument_beats_environment_beats_default(tmp_path, monkeypatch):
    monkeypatch.delenv("PROJECT_DATA_DIR", raising=False)
    monkeypatch.delenv("PROJECT_LOGS_DIR", raising=False)
    assert Paths().data.name == "data" and Paths().logs.name == "logs"
    monkeypatch.setenv("PROJECT_DATA_DIR", str(tmp_path / "d"))
    monkeypatch.setenv("PROJECT_LOGS_DIR", str(tmp_path / "l"))
    assert (Paths().data, Paths().logs) == (tmp_path / "d", tmp_path / "l")
    assert Paths(data="x", logs="y").data == Path("x") and Paths(data="x", logs="y").logs == Path("y")


def test_runs_are_numbered_and_never_shared(tmp_path):
    paths = Paths(logs=tmp_path)
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: paths.new_run("e"), range(16)))
    assert sorted(run.number for run in runs) == list(range(16))
    assert all(run.folder.is_dir() for run in runs)


def test_find_takes_a_run_or_the_newest_of_an_experiment(tmp_path):
    paths = Paths(logs=tmp_path)
    runs = [paths.new_run("e") for _ in range(11)]
    for run in runs[:-1]:
        run.config.write_text("")
    assert Run.find(tmp_path / "e") == runs[9]  # 10 has no configuration yet; 9 is newer than 1
    assert Run.find(runs[3].folder) == runs[3]
    for wrong, message in ((tmp_path / "no", "no such folder"), (tmp_path, "holds a config.yaml")):
        with pytest.raises(ValueError, match=message):
            Run.find(wrong)


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "f.txt"
    write_whole(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_half_written_is_no_model_file(tmp_path):
    run = Run(tmp_path)
    for name in ("model.onnx", ".42.model.onnx", "model.packed", ".42.model.packed"):
        (tmp_path / name).touch()
    assert [path.name for path in run.model_files] == ["model.onnx", "model.packed"]
