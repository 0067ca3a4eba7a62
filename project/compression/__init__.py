"""The mathematics of efficient inference; nothing here knows Lightning."""

from project.compression.low_rank import Factorizer
from project.compression.masks import Group, Masks, apply_masks_, removed_units, sparsity
from project.compression.pruning import Pruner
from project.compression.quantization import QuantizedLayer, Quantizer, quantize
from project.compression.sparsity_schedules import Gradual, Iterative, OneShot, QualityFactors, Rounds, Sparsities
from project.compression.surgery import Surgery, from_plain, register_surgery, replay_, to_plain
from project.compression.thin_layers import Factorize
from project.compression.thinning import Thin, Units, plan_thinning, units_of, why_not
from project.compression.weight_sharing import Codebook, Sharer
from project.compression.winograd import Winograd, WinogradConv2d
from project.compression.winograd_choice import WinogradChooser
from project.compression.xnor import BinarizeInputs

__all__ = [
    "BinarizeInputs",
    "Codebook",
    "Factorize",
    "Factorizer",
    "Gradual",
    "Group",
    "Iterative",
    "Masks",
    "OneShot",
    "Pruner",
    "QualityFactors",
    "QuantizedLayer",
    "Quantizer",
    "Rounds",
    "Sharer",
    "Sparsities",
    "Surgery",
    "Thin",
    "Units",
    "Winograd",
    "WinogradChooser",
    "WinogradConv2d",
    "apply_masks_",
    "from_plain",
    "plan_thinning",
    "quantize",
    "register_surgery",
    "removed_units",
    "replay_",
    "sparsity",
    "to_plain",
    "units_of",
    "why_not",
]
