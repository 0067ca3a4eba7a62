"""Augmentations: identity at zero strength, a draw per image, pure in (seed, epoch, image), equal to references."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from project.data import (
    BatchRandom,
    BatchTransform,
    Cutout,
    HorizontalFlip,
    Normalize,
    PadCrop,
    RandomAffine,
    RandomErasing,
)

SHAPES = [(1, 28, 28), (3, 32, 32), (2, 9, 14)]
ACTIVE = [
    PadCrop(3),
    PadCrop(2, "reflect"),
    HorizontalFlip(),
    RandomAffine(degrees=20, translate=0.1, scale=(0.8, 1.2), shear=10),
    RandomErasing(),
    RandomErasing(p=1.0, value="random"),
    Cutout(5),
]
IDENTITY = [
    PadCrop(0),
    HorizontalFlip(0.0),
    RandomAffine(),
    RandomErasing(p=0.0),
    Cutout(0),
    Cutout(8, p=0.0),
]


def images(shape: tuple[int, int, int], num: int = 64) -> Tensor:
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(0))


def random(num: int = 64, seed: int = 0, epoch: int = 0) -> BatchRandom:
    return BatchRandom(seed, epoch, torch.arange(num))


@pytest.mark.parametrize("transform", IDENTITY, ids=repr)
def test_identity_at_zero_strength(transform: BatchTransform) -> None:
    x = images((3, 32, 32))
    assert torch.equal(transform(x, random()), x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", ACTIVE, ids=repr)
def test_laws_of_every_transform(transform: BatchTransform, shape: tuple[int, int, int]) -> None:
    x = images(shape)
    before = x.clone()
    y = transform(x, random())
    assert torch.equal(x, before), "input was written to"
    assert y.shape == x.shape and y.dtype == x.dtype and y.min() >= 0 and y.max() <= 1 + 1e-6
    same = x[:1].expand_as(x)
    assert len(transform(same, random()).flatten(1).unique(dim=0)) > 1, "all images changed alike"
    assert torch.equal(transform(x, random()), y), "not a function of (seed, epoch, image)"
    assert not torch.equal(transform(x, random(epoch=1)), y)
    assert not torch.equal(transform(x, random(seed=1)), y)
    part = torch.tensor([40, 3, 17])
    assert torch.equal(transform(x[part], BatchRandom(0, 0, part)), y[part]), "depends on the batch"


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pad_crop_equals_a_loop(shape: tuple[int, int, int], mode: str) -> None:
    x, padding = images(shape), 3
    y = PadCrop(padding, mode)(x, random())  # type: ignore[arg-type]
    corners = random().integers(0, 2 * padding + 1, 2).tolist()
    padded = F.pad(x, [padding] * 4, mode="constant" if mode == "zeros" else mode)
    for k, (top, left) in enumerate(corners):
        assert torch.equal(y[k], padded[k, :, top : top + shape[1], left : left + shape[2]])
    assert {0, 2 * padding} <= {corner for pair in corners for corner in pair}


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = images((3, 8, 8), 1000)
    y = HorizontalFlip(0.5)(x, random(1000))
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(y[~mirrored], x[~mirrored]) and 440 < mirrored.sum() < 560
    assert torch.equal(HorizontalFlip(1.0)(x, random(1000)), x.flip(-1))


def test_affine_is_a_shift_rotation_and_zoom_in_pixels() -> None:
    """The matrix is the inverse map: of a rotation it is orthogonal in pixels, whatever the sides."""
    affine = RandomAffine(degrees=30)
    theta = affine._matrices(random(), torch.Size((20, 10)))
    pixels = torch.diag(torch.tensor([5.0, 10.0]))
    rotation = pixels @ theta[:, :, :2] @ pixels.inverse()
    assert torch.allclose(rotation @ rotation.mT, torch.eye(2).expand(64, 2, 2), atol=1e-5)
    assert torch.allclose(rotation.det(), torch.ones(64), atol=1e-5)
    angles = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0]).rad2deg()
    assert angles.abs().max() <= 30 and angles.min() < -20 and angles.max() > 20
    shifts = RandomAffine(translate=0.1)._matrices(random(), torch.Size((20, 10)))[:, :, 2]
    assert 0.15 < shifts.abs().max() <= 0.2
    factors = RandomAffine(scale=(0.5, 2.0))._matrices(random(), torch.Size((20, 10)))[:, 0, 0]
    assert factors.min() >= 0.5 and factors.max() <= 2


def test_affine_keeps_a_constant_image_and_matches_affine_grid() -> None:
    from project.data.transforms import _affine_grid

    ones = torch.ones(64, 1, 9, 14)
    border = RandomAffine(degrees=45, translate=0.3, shear=20, padding_mode="border")
    assert torch.allclose(border(ones, random()), ones, atol=1e-5)
    theta = RandomAffine(degrees=30, translate=0.2, shear=9)._matrices(random(), ones.shape[-2:])
    reference = F.affine_grid(theta, [64, 1, 9, 14], align_corners=False)
    assert torch.allclose(_affine_grid(theta, ones.shape[-2:]), reference, atol=1e-6)


def erased_boxes(mask: Tensor) -> list[tuple[int, int, int]]:
    """Height, width and number of pixels of what was changed in each image ``[N, H, W]``."""
    return [(int(m.any(1).sum()), int(m.any(0).sum()), int(m.sum())) for m in mask]


def test_erasing_writes_one_rectangle_of_the_right_area_and_shape() -> None:
    x = torch.ones(1000, 1, 32, 32)
    y = RandomErasing(p=0.7, scale=(0.1, 0.3), ratio=(0.5, 2.0), value=0.0)(x, random(1000))
    boxes = [box for box in erased_boxes(y[:, 0] == 0) if box[2]]
    assert 630 < len(boxes) < 770
    assert all(height * width == pixels for height, width, pixels in boxes)
    areas = torch.tensor([pixels / 1024 for _, _, pixels in boxes])
    assert areas.min() > 0.08 and areas.max() < 0.33 and abs(float(areas.mean()) - 0.2) < 0.01
    ratios = torch.tensor([height / width for height, width, _ in boxes])
    assert ratios.min() > 0.4 and ratios.max() < 2.5 and abs(float(ratios.log().mean())) < 0.06


def test_erasing_with_noise_keeps_the_rest() -> None:
    x = torch.zeros(200, 3, 16, 16)
    y = RandomErasing(p=1.0, value="random")(x, random(200))
    inside = (y != 0).any(1)
    assert abs(float(y.permute(0, 2, 3, 1)[inside].mean()) - 0.5) < 0.02
    assert all(pixels <= 0.45 * 256 for _, _, pixels in erased_boxes(inside))


def test_cutout_writes_a_square_that_the_border_clips() -> None:
    y = Cutout(6, value=0.5)(torch.ones(1000, 1, 20, 20), random(1000))
    boxes = erased_boxes(y[:, 0] == 0.5)
    assert all(3 <= height <= 6 and 3 <= width <= 6 and height * width == pixels for height, width, pixels in boxes)
    assert sum(box[2] == 36 for box in boxes) / 1000 == pytest.approx((15 / 20) ** 2, abs=0.06)


def test_normalize() -> None:
    x = images((3, 8, 8))
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(Normalize(mean, std)(x), expected, atol=1e-6)
    assert torch.equal(Normalize((0.0,) * 3, (1.0,) * 3)(x), x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PadCrop(-1), "padding is -1"),
        (lambda: PadCrop(1, "mirror"), "mode is 'mirror'"),
        (lambda: HorizontalFlip(1.5), "p is 1.5"),
        (lambda: RandomAffine(degrees=-3), "degrees is -3"),
        (lambda: RandomAffine(translate=-0.1), "translate is -0.1"),
        (lambda: RandomAffine(scale=(2.0, 1.0)), "scale is"),
        (lambda: RandomAffine(shear=90), "shear is 90"),
        (lambda: RandomErasing(p=-0.1), "p is -0.1"),
        (lambda: RandomErasing(scale=(0.0, 0.5)), "scale is"),
        (lambda: RandomErasing(scale=(0.5, 1.5)), "scale is"),
        (lambda: RandomErasing(ratio=(3.0, 0.3)), "ratio is"),
        (lambda: Cutout(-2), "size is -2"),
        (lambda: Cutout(2, p=2), "p is 2"),
        (lambda: Normalize((0.5,), (0.0,)), "std"),
        (lambda: Normalize((0.5,), (0.1, 0.2)), "std"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
