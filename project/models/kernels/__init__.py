"""Operations for CPUs that compiled C kernels do faster than torch, in training and in inference.

Without a C compiler torch's own operators run.
"""

from project.models.kernels.batch_norm import batch_norm_relu, batch_norm_relu_pool
from project.models.kernels.build import describe, switched
from project.models.kernels.first_layer import first_layer
from project.models.kernels.max_pool import max_pool
from project.models.kernels.winograd import can_run_winograd, count_tiles, pack_panels, same_bits, winograd

__all__ = [
    "batch_norm_relu",
    "batch_norm_relu_pool",
    "can_run_winograd",
    "count_tiles",
    "describe",
    "first_layer",
    "max_pool",
    "pack_panels",
    "same_bits",
    "switched",
    "winograd",
]
