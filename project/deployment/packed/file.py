"""``model.packed``: a net in the fewest bytes, with what is needed to build it and to use it.

The bytes are those of :mod:`project.deployment.packed.packing`; the header holds the
:class:`~project.deployment.recipe.Recipe` that builds the net and the file's
:class:`~project.deployment.model_file.Metadata`. Beside the file lies a table like tables 2 to 5 of Deep Compression
(Han et al. 2016, arXiv:1510.00149): what pruning, weight sharing and coding each make of a layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import project
from project.deployment.metadata import Metadata
from project.deployment.packed.packing import PACKAGE, Packed, PackedTensors, pack
from project.deployment.recipe import Recipe
from project.deployment.table import markdown_line, write_csv, write_number
from project.frame.paths import write_whole
from project.models.surgery import from_plain, to_plain

_INDEX_BITS = 5
"""Of the distance between two weights that are kept, in the columns P and P+Q (Han et al., sec. 3 and table 4)."""
_MAX_IMAGE = 1 << 22


@dataclass(frozen=True)
class LayerRow:
    """A weight, all vectors of one name, or the sum, in the paper's terms.

    Args:
        layer: name.
        num_weights: values.
        kept: share that is not zero.
        weight_bits: of a number of the codebook.
        coded_weight_bits: for each kept weight, coded.
        coded_index_bits: for the positions, for each kept weight, coded.
        bytes: coded, codebook included.
        rate_pruned: P: 32 bits for each kept weight and 5 for its index, against 32 for each weight.
        rate_shared: P+Q: numbers of a codebook instead, and the codebook.
        rate_coded: what the file has.

    A rate is ``None`` where nothing is left to store.
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
    """Make each -0 of the net a 0: a product with a mask leaves many, and they are no zeros to bits."""
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.0


def write_packed(net: nn.Module, metadata: Metadata, recipe: Recipe, path: Path) -> list[PackedTensors]:
    """Write the file; returns what its bits are spent on.

    Args:
        net: on the processor, with the structure that ``recipe`` builds.
        metadata: how to use it.
        recipe: how to build it.
        path: of the file.

    Raises:
        ValueError: when a tensor is of a type that the format has no place for.
    """
    surgeries = [_shorter(surgery) for surgery in recipe.surgeries]
    plain = {"net": recipe.renamed(project.__name__, PACKAGE).net, "surgeries": surgeries}
    content, rows = pack(net.state_dict(), {**asdict(metadata), "recipe": plain})
    path.write_bytes(content)
    return rows


def open_packed(path: Path, trust: Sequence[str] = ()) -> tuple[nn.Module, Metadata]:
    """The net, in eval mode, and how to use it.

    Args:
        path: of the file.
        trust: packages whose classes a net may be made of besides this package's.

    Raises:
        ValueError: when the file is damaged, is no packed file, or names code that is not trusted.
    """
    packed = Packed(path.read_bytes())
    metadata, recipe = _read(packed.header)
    net = recipe.renamed(PACKAGE, project.__name__).build(trust)
    logits = net(torch.empty(2, *metadata.image_shape, device="meta"))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, len(metadata.class_names)):
        raise ValueError(f"its net does not give {len(metadata.class_names)} logits")
    net.load_state_dict(packed.unpack(net.state_dict()), assign=True)
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"its net's {name} is not in its state dict")
    return net, metadata


def _shorter(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A surgery of the same shapes in fewer words: which units stayed shows in the weights."""
    surgery = from_plain(plain)
    shorten = getattr(surgery, "of_first_units", None)
    return to_plain(shorten() if shorten else surgery)


def _read(header: dict[str, Any]) -> tuple[Metadata, Recipe]:
    try:
        names, shape = tuple(header["class_names"]), tuple(header["image_shape"])
        mean, std = tuple(header["mean"]), tuple(header["std"])
        recipe = Recipe(dict(header["recipe"]["net"]), list(header["recipe"]["surgeries"]))
        known = all(isinstance(name, str) for name in names) and len(names) > 0
        known &= len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
        known &= math.prod(shape) <= _MAX_IMAGE and len(mean) == len(std) == shape[0]
        known &= all(math.isfinite(value) for value in mean) and all(0 < value < math.inf for value in std)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError("its header lacks classes, images, normalisation or net")
    return Metadata(names, shape, mean, std), recipe


# -- the table --------------------------------------------------------------------------------------------------------


def layer_rows(tensors: Sequence[PackedTensors]) -> list[LayerRow]:
    """One row for each weight, one for all vectors of one name, and the sum."""
    sums = [sum(column) for column in zip(*map(_bits, tensors), strict=True)]
    num, kept = sum(t.num for t in tensors), sum(t.num_nonzero for t in tensors)
    value_bits, position_bits = sum(t.value_bits for t in tensors), sum(t.position_bits for t in tensors)
    total = _row("total", num, kept, None, value_bits, position_bits, sums)
    return [
        *(_row(t.name, t.num, t.num_nonzero, _width(t), t.value_bits, t.position_bits, _bits(t)) for t in tensors),
        total,
    ]


def write_table(tensors: Sequence[PackedTensors], path: Path, num_parameters: int) -> str:
    """Write the table as CSV and Markdown beside the file; returns the Markdown.

    Args:
        tensors: of :func:`write_packed`.
        path: of the file.
        num_parameters: of the net, each of four bytes: what the file's size is compared with.
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
    """After pruning, after weight sharing, after coding: what a paper's storage would take, where it takes less."""
    dense, width = 32.0 * tensors.num, _width(tensors)
    pruned = min(dense, tensors.num_indexed * (32.0 + _INDEX_BITS))
    if width is None:
        return pruned, pruned, tensors.bits
    entries = replace(tensors, num_distinct=tensors.num_distinct + (tensors.num_nonzero < tensors.num))
    shared = min(tensors.num_indexed * float(width + _INDEX_BITS), tensors.num * float(_width(entries) or 32))
    return pruned, shared + 32.0 * tensors.num_distinct, tensors.bits


def _width(tensors: PackedTensors) -> int | None:
    """Bits of a number of the codebook; ``None`` where a codebook would be as long as the weights."""
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
