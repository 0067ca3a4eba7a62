"""Kernels where there is a compiler, which is nearly everywhere; a message where there is none."""

import pytest
import torch

from project.kernels.build import library


@pytest.fixture(scope="session")
def kernels() -> None:
    if library(torch.float32) is None:
        pytest.skip("there is no C compiler with OpenMP here, so there are no kernels")
