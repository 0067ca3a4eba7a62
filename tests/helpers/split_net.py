"""A net whose source code states the sizes of splits, also of one inside another."""

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """Splits what its convolution gives, and changes the order of the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).split([4, 8], 1)
        return torch.cat([b, a.relu()], 1)


class SplitNet(nn.Module):
    """Images [N, 3, 8, 8] to logits."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24)
        self.a, self.b, self.part = nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 16, 1), Part()
        self.head = nn.Linear(28, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.norm(self.stem(x)).relu(), [8, 16], 1)
        return self.head(torch.cat([self.a(a).relu(), self.part(self.b(b).relu())], 1).mean((2, 3)))
