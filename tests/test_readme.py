"""Every command of the README runs, made small by options that cut the training short."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    part.strip()
    for block in BLOCKS
    for line in block.splitlines()
    for part in line.split("#")[0].split("&&")
    if part.strip().startswith("project ")
]
FILES = re.findall(r"```(?:python|yaml)\n# (my[\w.]*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
"""Names and contents of the files of one's own that the README shows."""
SMALL = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
SMALL_BENCHMARK = ["--engines", "eager", "onnxruntime", "--rounds=1", "--memory=false"]


def test_the_readme_shows_the_main_job():
    assert "project fit --config configs/digits.yaml" in COMMANDS
    assert len(COMMANDS) >= 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the files of the README's examples."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.new("L", (20, 20), 200).save(tmp_path / "photo.png")
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name, _ in FILES:
        sys.modules.pop(Path(name).stem, None)


def test_classes_of_ones_own_in_the_working_directory(command, folder, logs):
    """A net, a data set, an augmentation and a loss, as the README has them, are found by class path."""
    from project.frame.paths import Run

    assert len(FILES) == 6
    commands = [line for line in COMMANDS if re.search(r"my\.yaml|logs/my\b", line)]
    assert [line.split()[1] for line in commands] == ["fit", "predict", "export"]
    for line, options in ((commands[0], ["--trainer.observe=false"]), (commands[1], [])):
        status, _, err = command(*shlex.split(line)[1:], *options)
        assert status == 0, f"{line}\n{err}"
    run = Run.find(logs / "my")
    assert run.predictions.is_file()
    assert json.loads(run.summary.read_text())["test/accuracy"] > 0.8
    for name in ("my_net.MyNet", "my_data.EvenOrOdd", "my_augmentation.Darken", "my_loss.FocalLoss"):
        assert name in run.config.read_text()


@pytest.mark.slow
def test_further_processes_find_classes_of_ones_own(folder, logs):
    """Those of DDP, of the loader and of a search, started by the console script, which Python gives no such path."""
    (folder / "space.yaml").write_text("space: {model.net.init_args.width: [8, 16]}\nsampler: grid\nworkers: 2\n")
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--data.num_workers=1"]
    small = ["--trainer.max_epochs=1", "--trainer.observe=false"]
    script = Path(sys.executable).with_name("project")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    for args in (
        ["fit", "--config=my.yaml", *ddp, *small],
        ["tune", "--config=my.yaml", "--config=space.yaml", *small],
    ):
        done = subprocess.run(
            [script, *args], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "test accuracy" in done.stdout or "2 of 2 trials done" in done.stdout


@pytest.mark.slow
def test_every_command_runs(command, folder, logs):
    """In the README's order, so that ``--run logs/digits`` finds what ``fit`` has left."""
    for line in COMMANDS:
        args = shlex.split(line)[1:]
        small = SMALL if args[0] == "fit" and "--help" not in args else []
        small = SMALL_BENCHMARK if args[0] == "benchmark" else small
        small = [*SMALL, "--trials=1"] if args[0] == "tune" else small
        small = ["--num_steps=20"] if args[0] == "find_lr" else small
        if "int8.yaml" in line or "weight_sharing" in line:
            small = [*small, "--trainer.callbacks.latency=false"]
        if "pruning" in line:
            schedule = "--trainer.callbacks.schedule.init_args"
            small = [*small, f"{schedule}.begin_epoch=0", f"{schedule}.end_epoch=0.5", f"{schedule}.every_n_steps=1"]
            small = [*small, "--trainer.callbacks.latency=false"]
            small = [*small, f"--trainer.callbacks.report={'true' if 'digits' in line else 'false'}"]
        if "fashion_mnist" in line and not Path("/usr/share/datasets/fashion-mnist").is_dir():
            continue
        status, out, err = command(*args, *small)
        assert status == 0, f"{line}\n{err}"
        assert out


@pytest.mark.parametrize("name", sorted(set(re.findall(r"configs/[\w/]+\.yaml", (ROOT / "README.md").read_text()))))
def test_every_configuration_named_is_there(name):
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"scripts/\w+\.py", (ROOT / "README.md").read_text())) or {""}))
def test_every_script_named_is_there(name):
    assert (ROOT / name).exists()
