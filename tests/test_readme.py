"""Every command of the README runs, made small by options that cut the training short."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [
    part.strip()
    for block in BLOCKS
    for line in block.splitlines()
    for part in line.split("#")[0].split("&&")
    if part.strip().startswith("project ")
]
SMALL = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
SMALL_BENCHMARK = ["--engines", "eager", "onnxruntime", "--rounds=1", "--memory=false"]


def test_the_readme_shows_the_main_job():
    assert "project fit --config configs/digits.yaml" in COMMANDS
    assert len(COMMANDS) >= 8


@pytest.mark.slow
def test_every_command_runs(command, logs, tmp_path, monkeypatch):
    """In the README's order, so that ``--run logs/digits`` finds what ``fit`` has left."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.new("L", (20, 20), 200).save(tmp_path / "photo.png")
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
