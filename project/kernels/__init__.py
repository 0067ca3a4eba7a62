"""What a compiled kernel does faster than torch on a CPU, in training and in inference; without a C compiler torch does
it.
"""

from project.kernels.batch_norm import batch_norm_relu, batch_norm_relu_pool
from project.kernels.first_layer import first_layer
from project.kernels.known import computes_as
from project.kernels.max_pool import max_pool
from project.kernels.winograd import can_run_winograd, count_tiles, pack_panels, same_bits, winograd

__all__ = [
    "batch_norm_relu",
    "batch_norm_relu_pool",
    "can_run_winograd",
    "computes_as",
    "count_tiles",
    "first_layer",
    "max_pool",
    "pack_panels",
    "same_bits",
    "winograd",
]
