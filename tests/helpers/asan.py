"""The kernels under AddressSanitizer: run with libasan preloaded, as ``tests/models/kernels/test_asan.py`` does.

python tests/helpers/asan.py write     a kernel that writes one value past the end of a tensor
python tests/helpers/asan.py ARG …     pytest with these arguments
"""

import sys

import pytest
import torch

from project.models.kernels import build

build.FLAGS = (*build.FLAGS, "-fsanitize=address", "-fno-omit-frame-pointer", "-g")


def write_past_the_end() -> None:
    """The output is one value shorter than what the kernel writes."""
    kernels = build.library(torch.float32)
    assert kernels is not None
    x = torch.zeros(8 * 4 * 4)
    y, place = torch.zeros(8 * 2 * 2 - 1), torch.zeros(8 * 2 * 2, dtype=torch.int32)
    kernels.max_pool(x.data_ptr(), 1, 4, 4, 8, 2, 2, 2, 2, 0, y.data_ptr(), place.data_ptr())


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_past_the_end()
        sys.exit(0)
    sys.exit(pytest.main(sys.argv[1:]))
