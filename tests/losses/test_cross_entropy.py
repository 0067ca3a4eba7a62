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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [LABELS, torch.tensor([[0.3, 0.7, 0, 0], [0, 0, 0, 1], [0.25] * 4])])
def test_class_weights_are_those_of_torch(smoothing, targets):
    weights = [0.5, 2.0, 0.0, 3.0]
    loss = CrossEntropy(smoothing, class_weights=weights)
    expected = F.cross_entropy(LOGITS, targets, weight=torch.tensor(weights), label_smoothing=smoothing)
    torch.testing.assert_close(loss(LOGITS, targets), expected)
    torch.testing.assert_close(
        loss.double()(LOGITS.double(), targets if targets.dim() == 1 else targets.double()).float(), expected
    )
    assert not loss.state_dict(), "checkpoints are those of a run without weights"


def test_class_weights_divide_as_the_docstring_says():
    weights = torch.tensor([0.5, 2.0, 0.0, 3.0])
    terms = weights[LABELS] * F.cross_entropy(LOGITS, LABELS, reduction="none")
    one_hot = F.one_hot(LABELS, 4).float()
    loss = CrossEntropy(class_weights=weights.tolist())
    torch.testing.assert_close(loss(LOGITS, LABELS), terms.sum() / weights[LABELS].sum())
    torch.testing.assert_close(loss(LOGITS, one_hot), terms.mean())


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [], [float("nan"), 1.0]])
def test_refuses_class_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="class_weights is"):
        CrossEntropy(class_weights=weights)
