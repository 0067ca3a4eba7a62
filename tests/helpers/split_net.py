"""A net whose source code states the sizes of parts, also in a module inside."""

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """Changes the order of what its convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 13, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).split([4, 9], 1)
        return torch.cat([b[:, 3:], b[:, :3].tanh(), a.relu()], 1)


class SplitNet(nn.Module):
    """Images [N, 3, 8, 8] to logits."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24)
        self.a, self.b, self.part = nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 16, 1), Part()
        self.head = nn.Linear(29, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.norm(self.stem(x)).relu(), [8, 16], 1)
        c, d, e = self.part(self.b(b).relu()).chunk(3, 1)
        return self.head(torch.cat([self.a(a).relu(), e, d, c], 1).mean((2, 3)))
