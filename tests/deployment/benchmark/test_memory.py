from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from project.deployment.benchmark.memory import peak_memory
from project.deployment.export import export_onnx

SHAPE = (16, 32, 32)


@pytest.mark.slow
def test_memory_grows_with_weights_and_images_and_a_failure_is_a_sentence(tmp_path: Path) -> None:
    small, large = nn.Conv2d(16, 16, 3), nn.Sequential(nn.Flatten(), nn.Linear(16 * 32 * 32, 1000))
    export_onnx(large, tmp_path / "large.onnx", SHAPE)
    (tmp_path / "none.onnx").write_text("none")
    tasks = [("eager", small), ("eager", large), ("onnxruntime", tmp_path / "large.onnx")]
    light, heavy, on_file, again, refused = peak_memory(
        [*tasks, ("eager", large), ("onnxruntime", tmp_path / "none.onnx")], SHAPE, batch_size=4
    )
    weights = 4 * 16 * 32 * 32 * 1000
    assert isinstance(light, int) and isinstance(heavy, int) and isinstance(on_file, int)
    assert 0 < light < 0.6 * weights < weights < heavy < 4 * weights and weights < on_file < 4 * weights
    assert again == pytest.approx(heavy, rel=0.1)
    assert isinstance(refused, str) and refused.startswith("ValueError: model file is")
    (many,) = peak_memory([("eager", small)], SHAPE, batch_size=512)
    activations = 4 * 512 * (16 * 30 * 30)
    assert isinstance(many, int) and many - light > 0.8 * activations
    assert torch.get_num_threads() >= 1


def test_a_net_that_cannot_be_pickled_leaves_the_others_measured() -> None:
    normed = nn.Sequential(weight_norm(nn.Conv2d(16, 4, 3)), nn.Flatten(), nn.LazyLinear(2))
    normed(torch.zeros(1, *SHAPE))
    plain = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    plain(torch.zeros(1, *SHAPE))
    refused, measured = peak_memory([("eager", normed), ("eager", plain)], SHAPE)
    assert isinstance(refused, str) and "RuntimeError" in refused and isinstance(measured, int)
