"""``model.packed``: a net in the fewest bytes, together with what is needed to build it and to use it.

:mod:`project.deployment.packed.packing` makes the bytes. The header holds the
:class:`~project.deployment.recipe.Recipe` that builds the net and the file's
:class:`~project.deployment.metadata.Metadata`. A table beside the file is like tables 2 to 5 of Deep Compression (Han
et al. 2016, arXiv:1510.00149): it lists what pruning, weight sharing and coding save in each layer.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import project
from project.deployment.metadata import Metadata
from project.deployment.packed.bounds import Bounds
from project.deployment.packed.packing import PACKAGE, Packed, PackedTensors, pack
from project.deployment.recipe import Recipe
from project.deployment.table import markdown_line, write_csv, write_number
from project.frame.paths import write_whole
from project.models.surgery import from_plain, to_plain

_INDEX_BITS = 5
"""Bits of the distance between two nonzero weights, in the columns P and P+Q (Han et al., sec. 3 and table 4)."""
_KEYS = ["class_names", "image_shape", "mean", "std", "recipe", "values"]
_MAX_IMAGE = 1 << 22
_TIMES, _EXTRA = 8, 1 << 20
"""A constructor with real values may make so many values for each value of the file, and so many more."""
_MAX_ACTIVATIONS = 1 << 29
"""Largest number of values of a tensor that the net computes for two images."""


@dataclass(frozen=True)
class LayerRow:
    """A row of the table in the paper's terms: a weight, all vectors of one name, or the sum.

    Each rate is the number of times that the layer gets smaller, compared with 32 bits for each weight. It is ``None``
    if nothing is left to store.

    Args:
        layer: name of the weight, pattern of the vectors' names, or "total".
        num_weights: number of values, zeros included.
        kept: share of the values that are not zero, from 0 to 1.
        weight_bits: number of bits of an index into the codebook; ``None`` if there is no codebook.
        coded_weight_bits: number of bits in the file for the value of each nonzero weight.
        coded_index_bits: number of bits in the file for the position of each nonzero weight.
        bytes: number of bytes in the file, codebook included.
        rate_pruned: rate after pruning (P): 32 bits for each nonzero weight and 5 bits for its index.
        rate_shared: rate after weight sharing too (P+Q): indices into a codebook instead of 32 bits, and the codebook.
        rate_coded: rate of the file, after entropy coding.
    """

    layer: str
    num_weights: int
    kept: float
    weight_bits: int | None
    coded_weight_bits: float | None
    coded_index_bits: float | None
    bytes: int
    rate_pruned: float | None
    rate_shared: float | None
    rate_coded: float | None


def without_minus_zeros_(net: nn.Module) -> None:
    """Make each -0 of the net a 0. A product with a mask leaves many -0, and their bits are not those of 0."""
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.0


def write_packed(net: nn.Module, metadata: Metadata, recipe: Recipe, path: Path) -> list[PackedTensors]:
    """Write a packed file.

    Args:
        net: net on the CPU, with the structure that ``recipe`` builds.
        metadata: class names, image shape and normalisation.
        recipe: description of how to build the net.
        path: path of the file to write.

    Returns:
        The number of bits that each weight, and all vectors of each name, take.

    Raises:
        ValueError: if the format cannot store the type of a tensor.
    """
    surgeries = [_shorter(surgery) for surgery in recipe.surgeries]
    plain = {"net": recipe.renamed(project.__name__, PACKAGE).net, "surgeries": surgeries}
    content, rows = pack(net.state_dict(), {**asdict(metadata), "recipe": plain})
    path.write_bytes(content)
    return rows


def open_packed(path: Path, trust: Sequence[str] = ()) -> tuple[nn.Module, Metadata]:
    """Read a packed file: the net in eval mode, and its metadata.

    Args:
        path: path of the packed file.
        trust: names of packages whose classes the net may use. The classes of this package are always allowed.

    Raises:
        ValueError: if the file is damaged, is no packed file, or names code that is not trusted.
    """
    packed = Packed(path.read_bytes())
    metadata, recipe = _read(packed.header)
    recipe = recipe.renamed(PACKAGE, project.__name__)
    try:
        return _build(packed, metadata, recipe, trust, "meta"), metadata
    except (_NoValuesError, NotImplementedError, RuntimeError):
        if not trust:  # the nets of this package need no values
            raise
    return _build(packed, metadata, recipe, trust, "cpu"), metadata


class _NoValuesError(ValueError):
    """The net needs values of tensors that the meta device does not have."""


def _build(packed: Packed, metadata: Metadata, recipe: Recipe, trust: Sequence[str], device: str) -> nn.Module:
    """Build the net of a file on a device, try it, and fill in the weights.

    Tensors on the meta device take no memory, but have no values. A net may need some: its constructor may compute its
    widths with tensors, or keep a tensor that is not in the state dict. Such a net is built on the CPU, where all its
    tensors together may have a few times the values that the file holds.
    """
    real = device != "meta"
    total = _TIMES * min(packed.header["values"], packed.max_values) + _EXTRA if real else None
    with torch.random.fork_rng(devices=[]), Bounds(packed.max_values, total), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a layer without weights
        net = recipe.build(trust, device)
    if any(not is_lazy(parameter) and not parameter.numel() for parameter in net.parameters()):
        raise ValueError("its net has a layer without weights")
    with Bounds(_MAX_ACTIVATIONS, _MAX_ACTIVATIONS if real else None), torch.no_grad():
        _check_logits(net(torch.zeros(2, *metadata.image_shape, device=device)), 2, metadata)
    state = net.state_dict()  # it has the version of each module, which some modules ask for
    state.update(packed.unpack(state))
    net.load_state_dict(state, assign=True)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            raise _NoValuesError(f"its net's {name} is not in its state dict")
    with torch.inference_mode():  # what the meta device lets pass, the CPU may refuse
        _check_logits(net(torch.zeros(1, *metadata.image_shape)), 1, metadata)
    return net


def _check_logits(logits: object, num: int, metadata: Metadata) -> None:
    wanted = (num, len(metadata.class_names))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted or not logits.is_floating_point():
        raise ValueError(f"its net does not give {wanted[1]} logits")


def _shorter(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A surgery that gives the same shapes in a shorter text. It needs no indices of the units that stayed, because the
    file holds their weights.
    """
    surgery = from_plain(plain)
    shorten = getattr(surgery, "of_first_units", None)
    return to_plain(shorten() if shorten else surgery)


def _read(header: dict[str, Any]) -> tuple[Metadata, Recipe]:
    try:
        names, shape = tuple(header["class_names"]), tuple(header["image_shape"])
        mean, std = tuple(header["mean"]), tuple(header["std"])
        recipe = Recipe(dict(header["recipe"]["net"]), list(header["recipe"]["surgeries"]))
        known = list(header) == _KEYS and list(header["recipe"]) == ["net", "surgeries"]
        known &= all(isinstance(header[key], list) for key in _KEYS[:4]) and isinstance(header["recipe"]["net"], dict)
        metadata = Metadata(names, shape, mean, std)
        metadata.check()
        known &= math.prod(shape) <= _MAX_IMAGE
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError("its header lacks classes, images, normalisation or net")
    return metadata, recipe


# -- the table --------------------------------------------------------------------------------------------------------


def layer_rows(tensors: Sequence[PackedTensors]) -> list[LayerRow]:
    """One row for each weight, one for all vectors of one name, and one for the sum."""
    sums = [sum(column) for column in zip(*map(_bits, tensors), strict=True)]
    num, kept = sum(t.num for t in tensors), sum(t.num_nonzero for t in tensors)
    value_bits, position_bits = sum(t.value_bits for t in tensors), sum(t.position_bits for t in tensors)
    total = _row("total", num, kept, None, value_bits, position_bits, sums)
    return [
        *(_row(t.name, t.num, t.num_nonzero, _width(t), t.value_bits, t.position_bits, _bits(t)) for t in tensors),
        total,
    ]


def write_table(tensors: Sequence[PackedTensors], path: Path, num_parameters: int) -> str:
    """Write the table as CSV and Markdown beside the packed file, and return the Markdown.

    Args:
        tensors: bits of each weight, as :func:`write_packed` returned them.
        path: path of the packed file.
        num_parameters: number of the net's parameters, each of four bytes, which the file's size is compared with.
    """
    rows = layer_rows(tensors)
    text = to_markdown(rows, tensors, path, num_parameters)
    write_whole(path.with_name(f"{path.stem}_packed.csv"), lambda part: write_csv(rows, LayerRow, part))
    write_whole(path.with_name(f"{path.stem}_packed.md"), lambda part: part.write_text(text, encoding="utf-8"))
    return text


def to_markdown(rows: Sequence[LayerRow], tensors: Sequence[PackedTensors], path: Path, num_parameters: int) -> str:
    size = path.stat().st_size
    heads = ("layer", "weights", "kept", "bits (P+Q)", "coded", "index, coded", "bytes", "P", "P+Q", "P+Q+coding")
    parts = {
        "positions": sum(t.position_bits for t in tensors) / 8,
        "weights": sum(t.value_bits for t in tensors if t.is_weight) / 8,
        "codebooks": sum(t.codebook_bits for t in tensors if t.is_weight) / 8,
        "scales, shifts, biases, statistics": sum(t.value_bits + t.codebook_bits for t in tensors if not t.is_weight)
        / 8,
    }
    parts["header and checksums"] = size - sum(parts.values())
    split = ", ".join(f"{name} {part:,.0f}" for name, part in parts.items())
    return "\n".join(
        [
            f"`{path.name}`: {size:,} bytes, 1/{4 * num_parameters / size:.1f} of four bytes for each of "
            f"{num_parameters:,} parameters. Bytes: {split}.",
            "",
            markdown_line(heads),
            markdown_line(["---", *["---:"] * (len(heads) - 1)]),
            *(markdown_line(_cells(row)) for row in rows),
            "",
        ]
    )


def _bits(tensors: PackedTensors) -> tuple[float, float, float]:
    """Bits after pruning, after weight sharing and after coding. The first two are those of the paper's storage, or of
    dense storage if that takes fewer bits.
    """
    dense, width = 32.0 * tensors.num, _width(tensors)
    pruned = min(dense, tensors.num_indexed * (32.0 + _INDEX_BITS))
    if width is None:
        return pruned, pruned, tensors.bits
    entries = replace(tensors, num_distinct=tensors.num_distinct + (tensors.num_nonzero < tensors.num))
    shared = min(tensors.num_indexed * float(width + _INDEX_BITS), tensors.num * float(_width(entries) or 32))
    return pruned, shared + 32.0 * tensors.num_distinct, tensors.bits


def _width(tensors: PackedTensors) -> int | None:
    """Bits of an index into the codebook; ``None`` if there are too many distinct values for a codebook."""
    if 2 * tensors.num_distinct > max(2, tensors.num_nonzero):
        return None
    return max(1, math.ceil(math.log2(max(1, tensors.num_distinct))))


def _row(
    layer: str, num: int, kept: int, width: int | None, value_bits: float, position_bits: float, bits: Sequence[float]
) -> LayerRow:
    pruned, shared, coded = (32 * num / part if part and kept else None for part in bits)
    return LayerRow(
        layer=layer,
        num_weights=num,
        kept=kept / max(num, 1),
        weight_bits=width,
        coded_weight_bits=value_bits / kept if kept else None,
        coded_index_bits=position_bits / kept if kept and position_bits else None,
        bytes=math.ceil(bits[2] / 8),
        rate_pruned=pruned,
        rate_shared=shared,
        rate_coded=coded,
    )


def _cells(row: LayerRow) -> list[str]:
    return [
        row.layer,
        f"{row.num_weights:,}",
        f"{100 * row.kept:.1f} %",
        write_number(row.weight_bits, "d"),
        write_number(row.coded_weight_bits, ".2f"),
        write_number(row.coded_index_bits, ".2f"),
        f"{row.bytes:,}",
        *(write_number(rate, ".1f", "x") for rate in (row.rate_pruned, row.rate_shared, row.rate_coded)),
    ]
