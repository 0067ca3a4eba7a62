"""The configurations that ``scripts/kill_and_resume.py`` kills: a few seconds each, on scikit-learn's digits."""

from copy import deepcopy
from typing import Any

_BASE: dict[str, Any] = {
    "seed_everything": 0,
    "data": {
        "class_path": "project.data.Digits",
        "init_args": {
            "batch_size": 64,
            "augment": [{"class_path": "project.data.RandomAffine", "init_args": {"degrees": 10, "translate": 0.08}}],
        },
    },
    "model": {
        "net": {
            "class_path": "project.models.SmallInception",
            "init_args": {"width": 0.25, "fc_dropout": 0.1},
        },
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        },
        "schedule": {"class_path": "project.learning.Linear", "init_args": {"warmup_epochs": 1}},
    },
    "trainer": {
        "max_epochs": 3,
        "limit_train_batches": 10,
        "accelerator": "cpu",
        "observe": False,
        "experiment": "killed",
    },
}


def _callback(name: str, /, **init_args: Any) -> dict[str, Any]:
    path = name if "." in name else f"project.callbacks.{name}"
    return {"class_path": path, "init_args": init_args}


def _object(name: str, /, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"project.compression.{name}", "init_args": init_args}


def _configuration(*callbacks: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    config = deepcopy(_BASE)
    config["trainer"] |= {**trainer, "callbacks": list(callbacks)}
    return config


_EMA = _callback("EMA", decay=0.9)
_OFTEN = _callback("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=3, save_last=True, save_top_k=0)
_IN_EPOCHS = {"val_check_interval": 0.5}

_STAGES = [(8, 16, 1), (16, 24, 1), (24, 32, 1), (32, None, 1)]
_BLOCK = "torchvision.models.convnext.CNBlockConfig"
_NETS: dict[str, dict[str, Any]] = {
    "depthwise": {"class_path": "torchvision.models.mobilenet_v2", "init_args": {"width_mult": 0.25}},
    "layer_norm": {
        "class_path": "torchvision.models.ConvNeXt",
        "init_args": {
            "block_setting": [
                {"class_path": _BLOCK, "init_args": {"input_channels": a, "out_channels": b, "num_layers": c}}
                for a, b, c in _STAGES
            ]
        },
    },
    "vit": {
        "class_path": "torchvision.models.VisionTransformer",
        "init_args": {
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 2,
            "num_heads": 4,
            "hidden_dim": 32,
            "mlp_dim": 48,
        },
    },
}
"""Nets in which norms, heads or depthwise convolutions belong to the units."""


def _units_of(net: dict[str, Any]) -> dict[str, Any]:
    """Units of a net of torchvision, in rounds that rewind it, on digits in colour."""
    config = _configuration(
        _callback(
            "IterativeMagnitudePruning",
            schedule=_object("Iterative", fraction=0.3, rounds=2),
            pruner=_object("Pruner", structure="units", scope="layer"),
            after="rewind",
            rewind_to="3it",
            epochs_per_round=1,
            latency=False,
        ),
        _OFTEN,
        max_epochs=1,
        limit_train_batches=6,
        limit_val_batches=1,
    )
    config["data"] = {"class_path": "any_net_cells.ColourDigits", "init_args": {"batch_size": 32}}
    config["model"]["net"] = net
    config["model"]["optimizer"]["init_args"]["lr"] = 0.01
    return config


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dense": _configuration(_EMA, _callback("PostTrainingQuantization", latency=False), max_epochs=6, **_IN_EPOCHS),
    "rewind": _configuration(
        _callback(
            "IterativeMagnitudePruning",
            schedule=_object("Iterative", fraction=0.3, rounds=3),
            after="rewind",
            rewind_to="5it",
            epochs_per_round=2,
            latency=False,
        ),
        _OFTEN,
        max_epochs=2,
    ),
    "units": _configuration(
        _callback(
            "IterativeMagnitudePruning",
            schedule=_object("Iterative", fraction=0.3, rounds=2),
            pruner=_object("Pruner", structure="units", criterion="obd", budget="macs", num_images=128),
            epochs_per_round=2,
            latency=False,
        ),
        _EMA,
        **_IN_EPOCHS,
    ),
    **{f"units_{name}": _units_of(net) for name, net in _NETS.items()},
    "sharing": _configuration(
        _callback(
            "IterativeMagnitudePruning",
            schedule=_object("Iterative", fraction=0.5, rounds=1),
            epochs_per_round=2,
            latency=False,
        ),
        _callback("WeightSharing", sharer=_object("Sharer", bits=4), epochs=2, latency=False, num_images=256),
        _callback("Packing"),
        **_IN_EPOCHS,
    ),
    "ternary": _configuration(
        _callback("TernaryWeights", method="ttq", begin_epoch=2), _callback("Packing"), _OFTEN, max_epochs=5
    ),
    "distillation": _configuration(
        _callback(
            "IterativeMagnitudePruning",
            schedule=_object("Iterative", fraction=0.4, rounds=2),
            after="rewind_lr",
            epochs_per_round=2,
            latency=False,
        ),
        _callback("DistillFrom", temperature=2.0, weight=0.7),
        **_IN_EPOCHS,
    ),
    "ddp": _configuration(
        _EMA,
        _callback(
            "IterativeMagnitudePruning",
            schedule=_object("Iterative", fraction=0.3, rounds=1),
            epochs_per_round=2,
            latency=False,
        ),
        devices=2,
        strategy="ddp",
        sync_batchnorm=True,
        limit_train_batches=6,
        **_IN_EPOCHS,
    ),
}
