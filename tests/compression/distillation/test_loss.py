"""The loss with a teacher: its formula, its limits, and that the teacher is left alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from project.losses import Distillation

IMAGES = torch.linspace(-1, 1, 24).view(6, 1, 2, 2)


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Dropout(0.5))


def logits() -> Tensor:
    return torch.linspace(-2, 3, 30).view(6, 5).sin().requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_the_papers_cross_entropy(temperature: float) -> None:
    student, net = logits(), teacher().eval()
    loss = F.cross_entropy(student, torch.arange(6) % 5)
    (ours,) = torch.autograd.grad(Distillation(net, temperature, 0.7)(IMAGES, student, loss), student)
    student = logits()
    target = (net(IMAGES) / temperature).softmax(1).detach()
    soft = -(target * (student / temperature).log_softmax(1)).sum(1).mean()
    paper = 0.3 * F.cross_entropy(student, torch.arange(6) % 5) + 0.7 * temperature**2 * soft
    torch.testing.assert_close(ours, *torch.autograd.grad(paper, student))


def test_a_student_that_agrees_pays_for_its_labels_alone() -> None:
    net = teacher().eval()
    student = net(IMAGES).detach()
    assert float(Distillation(net, 2, 0.25)(IMAGES, student, torch.tensor(8.0))) == pytest.approx(6.0)


def test_a_high_temperature_compares_logits() -> None:
    """Section 2.1: its gradient tends to that of half the squared difference of centred logits, over their number."""
    student, net = logits(), teacher().eval()
    (ours,) = torch.autograd.grad(Distillation(net, 1e3, 1)(IMAGES, student, torch.tensor(0.0)), student)
    centred = student - student.mean(1, keepdim=True)
    wanted = net(IMAGES) - net(IMAGES).mean(1, keepdim=True)
    torch.testing.assert_close(ours, (centred - wanted).detach() / 5 / 6, rtol=1e-2, atol=1e-4)


def test_the_teacher_is_neither_trained_nor_saved_nor_random() -> None:
    net = teacher()
    module = Distillation(net)
    assert not list(module.parameters()) and not module.state_dict()
    module.train()
    first, second = (module(IMAGES, logits(), torch.tensor(0.0)) for _ in range(2))
    assert torch.equal(first, second) and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(("arguments", "words"), [((0.0, 0.5), "temperature is 0"), ((4.0, 1.5), "weight is 1.5")])
def test_wrong_numbers_are_named(arguments: tuple[float, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Distillation(teacher(), *arguments)
