"""Muon against torch's own, Adam against torch's own, and what it does with a whole net."""

import pytest
import torch
from torch import nn

from project.learning.optimizers import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_weights_move_as_with_torchs_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape))
    theirs.data.copy_(ours.data)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    optimizers = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    start = ours.detach().clone()
    for _ in range(4):
        grad = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch iterates in bfloat16


def test_norms_and_biases_move_as_with_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(7)), nn.Parameter(torch.empty(7))
    theirs.data.copy_(ours.data)
    optimizers = (
        Muon([{"params": [ours], "weight_decay": 0.1}], adam_lr=0.02, betas=(0.8, 0.95)),
        torch.optim.AdamW([theirs], lr=0.02, betas=(0.8, 0.95), weight_decay=0.1),
    )
    for _ in range(5):
        grad = torch.randn(7)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_an_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    spectrum = torch.diag(torch.logspace(0, -1, 200))
    matrices = [torch.randn(rows, 200) @ spectrum for rows in (32, 48, 32)]
    for matrix, orthogonal in zip(matrices, orthogonalize(matrices), strict=True):
        singular = torch.linalg.svdvals(orthogonal)
        assert singular.min() > 0.5
        assert singular.max() < 1.3
        torch.testing.assert_close(orthogonalize([matrix.mT])[0], orthogonal.mT)


def test_iterating_on_the_small_matrix_is_the_iteration_of_the_source() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 48, 8) @ torch.randn(8, 200)  # rank 8: forty singular values are zero
    x = matrices.double() / matrices.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(torch.stack(orthogonalize(list(matrices))).double(), x, rtol=0, atol=1e-3)


def test_a_convolution_is_the_matrix_of_its_filters_in_any_memory_format() -> None:
    torch.manual_seed(0)
    conv, matrix = torch.randn(8, 3, 3, 3), torch.empty(8, 27)
    matrix.copy_(conv.flatten(1))
    grad = torch.randn(8, 3, 3, 3)
    contiguous, last, flat = (
        nn.Parameter(conv.clone()),
        nn.Parameter(conv.clone().to(memory_format=torch.channels_last)),
        nn.Parameter(matrix),
    )
    contiguous.grad, flat.grad = grad.clone(), grad.flatten(1)
    last.grad = grad.to(memory_format=torch.channels_last)
    for parameter in (contiguous, last, flat):
        Muon([parameter]).step()
    torch.testing.assert_close(contiguous.flatten(1), flat)
    torch.testing.assert_close(contiguous, last)


def test_its_state_goes_through_a_checkpoint() -> None:
    def net_and_optimizer() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
        weights = [p for p in net.parameters() if p.dim() > 1]
        return net, Muon([{"params": weights}, {"params": [p for p in net.parameters() if p.dim() == 1]}], lr=0.05)

    def steps(net: nn.Module, optimizer: Muon, seeds: range) -> None:
        for seed in seeds:
            images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()

    whole, optimizer = net_and_optimizer()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 5e-3]
    steps(whole, optimizer, range(4))
    first, optimizer = net_and_optimizer()
    steps(first, optimizer, range(2))
    second, resumed = net_and_optimizer()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, range(2, 4))
    for wanted, got in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_refusals() -> None:
    weight, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="two groups"):
        Muon([weight, bias])
    with pytest.raises(ValueError, match=r"lr is -1.*choose 0 or more"):
        Muon([weight], lr=-1)
    with pytest.raises(ValueError, match="momentum is 1"):
        Muon([weight], momentum=1)
