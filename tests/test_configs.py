"""Every YAML parses and builds its classifier, data module and trainer."""

from pathlib import Path

import pytest
import torch

from project.frame.cli import CLI

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "tune")
WHOLE = [path for path in CONFIGS if path.parts[1] not in ("debug", "callbacks", "compression", "nets")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, for the configurations that take one."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (80, 70), (40 * index, 90, 200)).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_it_builds_and_its_net_takes_its_images(path, images, logs):
    if "timm." in (ROOT / path).read_text():
        pytest.importorskip("timm")
    whole = path if path in WHOLE else Path(f"configs/{'colour_digits' if path.parts[1] == 'nets' else 'digits'}.yaml")
    base = [] if path in WHOLE else ["--config", str(ROOT / whole)]
    folder = ["--data.root", str(images)] if "ImageFolder" in (ROOT / whole).read_text() else []
    cpu = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    cli = CLI([*base, "--config", str(ROOT / path), *folder, *cpu], run=False)
    batch = torch.zeros(2, *cli.datamodule.image_shape)
    assert cli.model.eval()(batch).shape == (2, cli.datamodule.num_classes)
    assert cli.model.mean == tuple(cli.datamodule.mean) and cli.model.class_names == tuple(cli.datamodule.class_names)
    assert not logs.exists(), "building makes no folder"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_it_opens_with_its_command(path):
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# project fit --config configs/") and str(path) in first
