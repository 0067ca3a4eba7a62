import pytest
import torch
from torch.nn import functional as F

from project.losses import CrossEntropy

LOGITS = torch.linspace(-2, 3, 12).view(3, 4).sin() * 3
LABELS = torch.tensor([0, 3, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_is_the_papers_formula_on_class_numbers(smoothing):
    one_hot = F.one_hot(LABELS, 4).float()
    smoothed = (1 - smoothing) * one_hot + smoothing / 4
    expected = -(smoothed * LOGITS.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(CrossEntropy(smoothing)(LOGITS, LABELS), expected)
    torch.testing.assert_close(CrossEntropy(smoothing)(LOGITS, one_hot), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_a_mixture_is_the_mixture_of_losses(smoothing):
    loss, other = CrossEntropy(smoothing), torch.tensor([2, 3, 0])
    mixed = 0.3 * F.one_hot(LABELS, 4).float() + 0.7 * F.one_hot(other, 4).float()
    torch.testing.assert_close(loss(LOGITS, mixed), 0.3 * loss(LOGITS, LABELS) + 0.7 * loss(LOGITS, other))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_refuses_a_share_outside_0_to_1(smoothing):
    with pytest.raises(ValueError, match="label_smoothing is"):
        CrossEntropy(smoothing)
