"""The public names of all techniques of efficient inference. Each technique has a folder of its own."""

from project.frame.rooms import lazily

_HOMES = {
    "BinarizeInputs": "project.compression.low_bit.xnor",
    "Codebook": "project.compression.weight_sharing.codebook",
    "DistillFrom": "project.compression.distillation.callback",
    "Distillation": "project.compression.distillation.loss",
    "Factorize": "project.compression.low_rank.thin_layers",
    "Factorizer": "project.compression.low_rank.factorizer",
    "Gradual": "project.compression.pruning.schedules",
    "Group": "project.compression.pruning.masks",
    "Iterative": "project.compression.pruning.schedules",
    "Masks": "project.compression.pruning.masks",
    "NormScaleL1": "project.compression.pruning.norm_scales",
    "OneShot": "project.compression.pruning.schedules",
    "Pruner": "project.compression.pruning.pruner",
    "QualityFactors": "project.compression.pruning.schedules",
    "QuantizedLayer": "project.deployment.int8.quantizer",
    "Quantizer": "project.deployment.int8.quantizer",
    "Rounds": "project.compression.pruning.schedules",
    "Sharer": "project.compression.weight_sharing.codebook",
    "Sparsities": "project.compression.pruning.schedules",
    "Surgery": "project.models.surgery",
    "Thin": "project.compression.thinning.thin",
    "Units": "project.compression.thinning.groups",
    "Winograd": "project.compression.winograd.convolution",
    "WinogradChooser": "project.compression.winograd.choice",
    "WinogradConv2d": "project.compression.winograd.convolution",
    "apply_masks_": "project.compression.pruning.masks",
    "from_plain": "project.models.surgery",
    "plan_thinning": "project.compression.thinning.units",
    "quantize": "project.deployment.int8.quantizer",
    "register_surgery": "project.models.surgery",
    "removed_units": "project.compression.pruning.masks",
    "replay_": "project.models.surgery",
    "sparsity": "project.compression.pruning.masks",
    "to_plain": "project.models.surgery",
    "units_of": "project.compression.thinning.units",
    "why_not": "project.compression.thinning.units",
}
"""The module that each name is defined in. It is imported when the name is first used."""

__all__ = sorted(_HOMES)
__getattr__ = lazily(_HOMES)


def __dir__() -> list[str]:
    return __all__
