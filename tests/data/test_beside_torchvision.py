"""Augmentations beside those of torchvision: the same picture, or the same distribution, at both ends too."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from project.data import BatchRandom, CutMix, PadCrop, RandomAffine, RandomErasing, RandomResizedCrop

N = 3000
SIZE = (20, 28)  # height and width


def random(num: int = N) -> BatchRandom:
    return BatchRandom(0, 0, torch.arange(num))


def agree(ours: Tensor, theirs: Tensor) -> None:
    """Means agree within six standard errors, standard deviations within a tenth, and so do the extremes."""
    error = float(theirs.std()) / len(theirs) ** 0.5
    assert float(ours.mean()) == pytest.approx(float(theirs.mean()), abs=6 * error)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.1)
    width = float(theirs.max() - theirs.min())
    assert float(ours.min()) == pytest.approx(float(theirs.min()), abs=0.05 * width)
    assert float(ours.max()) == pytest.approx(float(theirs.max()), abs=0.05 * width)


def boxes(found: list[dict[str, int]]) -> Tensor:
    """Top, left, height and width of torchvision's boxes, ``[4, N]``."""
    return torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in found]).T.double()


def describe(top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> list[Tensor]:
    """Area, proportions, and place as a share of the room that the box leaves."""
    free = (top / (SIZE[0] - height).clamp(min=1), left / (SIZE[1] - width).clamp(min=1))
    return [height * width / (SIZE[0] * SIZE[1]), (width / height).log(), *free]


def test_an_affine_map_is_torchvisions() -> None:
    """Shear, scale and rotation around the centre come first, then the shift: the scale does not change it."""
    x = torch.rand(24, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    y = RandomAffine(degrees=40, translate=0.2, scale=(0.5, 1.6), shear=15)(x, random(24))
    for k, (angle, shear, right, down, factor) in enumerate(random(24).uniform(5).tolist()):
        expected = v2.functional.affine(
            x[k],
            angle=-40 * (2 * angle - 1),
            translate=[-0.2 * (2 * right - 1) * SIZE[1], -0.2 * (2 * down - 1) * SIZE[0]],
            scale=0.5 + 1.1 * factor,
            shear=[15 * (2 * shear - 1), 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        assert torch.allclose(y[k], expected, atol=1e-4)


def test_a_shift_does_not_depend_on_the_scale() -> None:
    """A point at the centre of an image that is halved goes as far as in one that is not."""
    x = torch.zeros(200, 1, 33, 33)
    x[:, :, 15:18, 15:18] = 1
    places = []
    for scale in (1.0, 0.5):
        y = RandomAffine(translate=0.3, scale=(scale, scale))(x, random(200))[:, 0]
        places.append((y.sum(1) * torch.arange(33)).sum(1) / y.sum((1, 2)) - 16)
    assert places[0].abs().max() > 9 and torch.allclose(places[0], places[1], atol=0.8)


def test_random_crops_are_distributed_as_torchvisions() -> None:
    theirs = v2.RandomResizedCrop(SIZE, scale=(0.2, 0.9), ratio=(0.5, 2.0))
    image = torch.zeros(3, *SIZE)
    torch.manual_seed(0)
    expected = boxes([theirs.make_params([image]) for _ in range(N)])
    crop = RandomResizedCrop((0.2, 0.9), (0.5, 2.0))
    found = [each.box((SIZE[1], SIZE[0])) for each in crop.draw(random())]
    left, top, right, bottom = torch.tensor([box for box in found if box]).T.double()
    for our, their in zip(describe(top, left, bottom - top, right - left), describe(*expected), strict=True):
        agree(our, their)


def test_erased_boxes_are_distributed_as_torchvisions() -> None:
    theirs = v2.RandomErasing(p=1.0, scale=(0.1, 0.4), ratio=(0.5, 2.0))
    image = torch.zeros(1, *SIZE)
    torch.manual_seed(0)
    expected = torch.tensor([[p["i"], p["j"], p["h"], p["w"]] for p in (theirs.make_params([image]) for _ in range(N))])
    y = RandomErasing(p=1.0, scale=(0.1, 0.4), ratio=(0.5, 2.0))(torch.ones(N, 1, *SIZE), random())[:, 0] == 0
    rows, columns = y.any(2), y.any(1)
    found = (rows.int().argmax(1), columns.int().argmax(1), rows.sum(1), columns.sum(1))
    for our, their in zip(describe(*(each.double() for each in found)), describe(*expected.T.double()), strict=True):
        agree(our, their)


def test_cutmix_keeps_the_share_of_the_papers_formula() -> None:
    """The mean for weights from 0 to 1, from eq. 2 of the paper with a clipped rectangle.

    torchvision keeps 0.71 here, because it rounds both sides of the rectangle down to an even number of pixels.
    """
    weight = (torch.arange(20000) + 0.5) / 20000
    images = torch.zeros(20000, 1, *SIZE)
    pasted, kept = CutMix().blend(images, images + 1, weight, random(20000))
    assert float(kept.mean()) == pytest.approx(1 / 2 + 1 / 5 - 1 / 48, abs=0.006)
    assert torch.allclose(1 - pasted.mean((1, 2, 3)), kept, atol=1e-6)
    assert CutMix().blend(images[:9], images[:9] + 1, torch.ones(9), random(9))[1].tolist() == [1.0] * 9


@pytest.mark.parametrize("padding", [1, 4])
def test_every_place_of_a_padded_crop_is_as_likely(padding: int) -> None:
    x = torch.zeros(N, 1, *SIZE)
    x[:, 0, 10, 14] = 1
    y = PadCrop(padding)(x, random())[:, 0]
    for dim, place in ((1, 14), (2, 10)):
        counts = torch.bincount(y.any(dim).int().argmax(1) - place + padding)
        assert len(counts) == 2 * padding + 1 and counts.min() > 0.7 * N / len(counts)
