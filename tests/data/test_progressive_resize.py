"""Small images in early epochs, whole ones later."""

import pytest
import torch

from project.data import BatchRandom, ProgressiveResize


@pytest.mark.parametrize(("epoch", "side"), [(0, 12), (2, 12), (3, 16), (4, 16), (5, 20), (9, 20)])
def test_the_epoch_decides_the_size(epoch, side):
    images = torch.rand(4, 1, 20, 20)
    resized = ProgressiveResize({0: 12, 3: 16, 5: 28})(images, BatchRandom(0, epoch, torch.arange(4)))
    assert resized.shape == (4, 1, side, side)
    assert torch.equal(resized, images) == (side == 20)
    assert torch.allclose(resized.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=0.02)


def test_before_the_first_epoch_named_images_keep_their_size():
    images = torch.rand(2, 3, 8, 8)
    assert ProgressiveResize({2: 4})(images, BatchRandom(0, 1, torch.arange(2))) is images


@pytest.mark.parametrize("sizes", [{-1: 8}, {0: 0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes has"):
        ProgressiveResize(sizes)
