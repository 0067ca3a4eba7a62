"""What ``scripts/fuzz.py`` needs of each file format: whole files, ways to damage them, and a check of the reader.

A check returns "refused" for a ValueError of one sentence, or exit status 2 at the command line. It returns "same" if
the reader's answer is also the answer to a file that is written from it. Anything else is an error of the reader.
"""

import contextlib
import gzip
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NASTY: tuple[Any, ...] = (
    *(0, -1, 1, 3, 255, 2**31, 2**32 - 1, 2**63, 10**30, 1e308, 1e-320, float("nan"), float("inf"), None, True, ""),
    *([], {}, [[]], [10**9] * 3, "os.system", "torch.nn.LayerNorm", "ü", "\n", "\0", "x" * 3000, (1, 2)),
    {"class_path": "os.system", "init_args": {"command": "true"}},
)
_NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes that are changed, added, removed, moved or cut off, at one to eight places."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 4, 16))
        if rng.random() < 0.3:
            place = min(place, rng.randrange(64))  # headers are at the beginning
        match rng.randrange(7):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place : place + length] = rng.randbytes(length)
            case 2:
                changed[place:place] = rng.randbytes(length)
            case 3:
                del changed[place : place + length]
            case 4:
                del changed[place:]
            case 5:
                other = rng.randrange(len(changed) + 1)
                a, b = changed[place : place + length], changed[other : other + length]
                changed[place : place + length], changed[other : other + length] = b, a
            case 6:
                number = rng.choice(_NUMBERS)
                changed[place : place + 4] = struct.pack(rng.choice("<>") + "I", number)
    return bytes(changed)


def crafted(value: Any, rng: random.Random) -> Any:
    """Plain values with one value, at any depth, that somebody hostile would write there."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.15:
        return rng.choice(NASTY)
    key = rng.choice(keys)
    if isinstance(value, list):
        return [*value[:key], crafted(value[key], rng), *value[key + 1 :]]
    if rng.random() < 0.1:
        return {other: item for other, item in value.items() if other != key}
    return {**value, key: crafted(value[key], rng)}


def _refuses(read: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether ``read`` raises a ValueError of one sentence, and else what it returns."""
    try:
        return False, read()
    except ValueError as error:
        words = str(error)
        if not 0 < len(words.splitlines()) < 2:
            raise AssertionError(f"no sentence: {words!r}") from error
        if len(words) > 1000:
            raise AssertionError(f"a sentence of {len(words)} characters: {words[:200]!r}") from error
        return True, None


def _expect(condition: bool, words: str) -> None:
    if not condition:
        raise AssertionError(words)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


class Format:
    """A file format. ``folder`` is a folder for files; ``inputs`` are whole files of the format."""

    suffix = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = self.make()

    def make(self) -> list[bytes]:
        raise NotImplementedError

    def mutate(self, rng: random.Random) -> bytes:
        return damaged(rng.choice(self.inputs), rng)

    def check(self, path: Path) -> str:
        raise NotImplementedError


METADATA = {"class_names": ("cat", "dog", "emu"), "image_shape": (1, 8, 8), "mean": (0.3,), "std": (0.4,)}
NORM = {"class_path": "project.models.BatchNorm"}
NETS = (
    {
        "class_path": "project.models.SmallInception",
        "init_args": {
            **{"num_classes": 3, "image_shape": [1, 8, 8], "width": 0.25, "stem": [8]},
            **{"stages": [[256]], "norm": {"class_path": "project.models.NoNorm"}},
        },
    },
    {
        "class_path": "project.models.SmallInception",
        "init_args": {
            **{"num_classes": 3, "image_shape": [1, 8, 8], "width": 0.25, "stem": [8, 16]},
            **{"stages": [[32], [32]], "norm": NORM, "activation": {"class_path": "torch.nn.ReLU"}},
        },
    },
)


def _net(description: dict[str, Any]) -> torch.nn.Module:
    """A net with a few values, pruned: as a codebook, as fixed point numbers, with zeros, and as they are."""
    from project.deployment.recipe import Recipe

    torch.manual_seed(0)
    net = Recipe(description).build().to_empty(device="cpu")
    with torch.no_grad():
        for index, (name, tensor) in enumerate(net.state_dict().items()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape) / 8)
                if index % 3 == 0:
                    tensor.copy_((tensor * 16).round().clamp(-3, 3) / 16 + 0.0)
                if tensor.dim() > 1 and index % 4 == 0:
                    tensor *= tensor.abs() > 0.1
                    tensor += 0.0
                if "var" in name:
                    tensor.copy_(tensor.abs() + 0.5)
            else:
                tensor.zero_()
    return net.eval()


class PackedFormat(Format):
    suffix = ".packed"

    def make(self) -> list[bytes]:
        from project.deployment.metadata import Metadata
        from project.deployment.packed.file import write_packed
        from project.deployment.recipe import Recipe

        contents = []
        for net in NETS:
            path = self.folder / "whole.packed"
            write_packed(_net(net), Metadata(**METADATA), Recipe(net), path)  # type: ignore[arg-type]
            contents.append(path.read_bytes())
        return contents

    def mutate(self, rng: random.Random) -> bytes:
        from project.deployment.packed.packing import Packed

        content = rng.choice(self.inputs)
        *_, check, length = struct.unpack_from("<4sBIII", content)
        header, data = content[17 : 17 + length], content[17 + length :]
        match rng.randrange(5):
            case 0:
                return damaged(content, rng)
            case 1:
                header = damaged(header, rng)
            case 2:
                header = _deflated(_json(crafted(Packed(content).header, rng)))
            case 3:
                header = _deflated(damaged(_json(Packed(content).header), rng))
            case 4:
                data = damaged(data, rng)
                data += bytes(-len(data) % 4)
        content = _framed(header, data, check)
        return content if rng.random() < 0.2 else _with_checksum(content, header, data)

    def check(self, path: Path) -> str:
        from project.deployment.model_file import ModelFile
        from project.deployment.packed.packing import Packed, pack

        refused, file = _refuses(lambda: ModelFile(path))
        if refused:
            return "refused"
        packed, pixels = Packed(path.read_bytes()), _pixels(file.metadata.image_shape)
        state = packed.unpack(file.net.state_dict())
        header = {key: value for key, value in packed.header.items() if key != "values"}
        again = path.with_name("again.packed")
        again.write_bytes(pack(state, header)[0])
        other = ModelFile(again)
        _expect(other.metadata == file.metadata, "other metadata")
        for name, tensor in state.items():
            _expect(_same_bits(tensor, other.net.state_dict()[name]), f"another {name}")  # type: ignore[union-attr]
        _expect(_equal(file.probabilities(pixels), other.probabilities(pixels)), "another answer")
        return "same"


def _pixels(shape: tuple[int, int, int]) -> Tensor:
    return (torch.arange(2 * int(np.prod(shape))) * 7919 % 256).to(torch.uint8).reshape(2, *shape)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.contiguous().numpy().tobytes()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _deflated(text: bytes) -> bytes:
    from project.deployment.packed import packing

    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=packing._DICTIONARY)
    return compressor.compress(text) + compressor.flush()


def _framed(header: bytes, data: bytes, check: int) -> bytes:
    """A packed file whose own checksum is right."""
    rest = struct.pack("<II", check, len(header)) + header + data
    return b"\x93NET\x01" + struct.pack("<I", zlib.crc32(rest)) + rest


def _with_checksum(content: bytes, header: bytes, data: bytes) -> bytes:
    """The file with the checksum of the tensors that its bytes are read as, if they can be read at all."""
    from project.deployment.packed import packing
    from project.deployment.packed.bitstream import Decoder
    from project.deployment.packed.bounds import Bounds
    from project.deployment.packed.tensor_codes import code_group, groups_of
    from project.deployment.recipe import Recipe

    try:
        recipe = packing.Packed(content).header["recipe"]
        with Bounds(1 << 24):
            like = Recipe(recipe["net"], recipe["surgeries"]).build().state_dict()
        coder, found = Decoder(data, 1 << 17), {}
        with np.errstate(all="ignore"):
            for group in groups_of(like):
                found.update(code_group(coder, None, group, like))
        return _framed(header, data, packing._checksum({name: found[name] for name in like}))
    except Exception:
        return content


class CheckpointFormat(Format):
    suffix = ".ckpt"

    def make(self) -> list[bytes]:
        from project.learning import Classifier

        torch.manual_seed(0)
        names = ("cat", "dog", "emu")
        module = Classifier(net=_net(NETS[1]), num_classes=3, image_shape=(1, 8, 8), class_names=names)
        optimizer = module.make_optimizer(module.parameter_groups())
        content = {
            **{"epoch": 1, "global_step": 20, "pytorch-lightning_version": "2.6.0", "loops": {}, "callbacks": {}},
            **{"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []},
            "hparams_name": "kwargs",
            "hyper_parameters": {
                **{"net": NETS[1], "num_classes": 3, "image_shape": [1, 8, 8], "class_names": list(names)},
                **{"mean": [0.3], "std": [0.4]},
            },
        }
        module.on_save_checkpoint(content)
        self.content = content
        stream = io.BytesIO()
        torch.save(content, stream)
        return [stream.getvalue()]

    def mutate(self, rng: random.Random) -> bytes:
        (content,) = self.inputs
        match rng.randrange(4):
            case 0:
                return damaged(content, rng)
            case 1:
                return _with_part(content, rng, "data.pkl")
            case 2:
                return _with_part(content, rng)
        stream = io.BytesIO()
        torch.save(crafted(self.content, rng), stream)
        return stream.getvalue()

    def check(self, path: Path) -> str:
        from project.learning import Classifier
        from project.learning.checkpoints import check_checkpoint

        def read(path: Path) -> Any:
            check_checkpoint(path)
            return Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)

        refused, module = _refuses(lambda: read(path))
        if refused:
            return "refused"
        again = path.with_name("again.ckpt")
        torch.save(
            {**torch.load(path, map_location="cpu", weights_only=True), "state_dict": module.state_dict()}, again
        )
        other = read(again)
        for name, tensor in module.state_dict().items():
            _expect(_same_bits(tensor, other.state_dict()[name]), f"another {name}")
        return "same"


def _with_part(content: bytes, rng: random.Random, end: str = "") -> bytes:
    """The zip file with one of its parts damaged, and right checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        names = source.namelist()
        chosen = rng.choice([name for name in names if name.endswith(end)])
        for name in names:
            part = source.read(name)
            target.writestr(name, damaged(part, rng) if name == chosen else part)
    return stream.getvalue()


class OnnxFormat(Format):
    suffix = ".onnx"

    def make(self) -> list[bytes]:
        from project.deployment.metadata import Metadata
        from project.deployment.onnx_file import export_onnx

        contents = []
        for net in NETS:
            path = self.folder / "whole.onnx"
            strings = Metadata(**METADATA).to_strings()  # type: ignore[arg-type]
            export_onnx(_net(net), path, (1, 8, 8), metadata=strings)
            contents.append(path.read_bytes())
        return contents

    def mutate(self, rng: random.Random) -> bytes:
        import onnx

        content = rng.choice(self.inputs)
        if rng.random() < 0.5:
            return damaged(content, rng)
        model = onnx.load_from_string(content)
        for _ in range(rng.choice((1, 1, 3))):
            _change_(model, rng)
        return model.SerializeToString()

    def check(self, path: Path) -> str:
        import onnx

        from project.deployment.model_file import ModelFile

        def read(path: Path) -> Any:
            file = ModelFile(path)
            return file, file.probabilities(_pixels(file.metadata.image_shape))

        refused, answer = _refuses(lambda: read(path))
        if refused:
            return "refused"
        again = path.with_name("again.onnx")
        again.write_bytes(onnx.load_from_string(path.read_bytes()).SerializeToString())
        file, found = read(again)
        _expect(file.metadata == answer[0].metadata and _equal(found, answer[1]), "another answer")
        return "same"


def _change_(message: Any, rng: random.Random) -> None:
    """Change one field of a protocol buffer, at any depth, to a value that somebody hostile would write there."""
    fields = message.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    repeated = not isinstance(value, int | float | str | bytes) and hasattr(value, "append")
    if repeated and len(value) and rng.random() < 0.15:
        del value[rng.randrange(len(value))]
        return
    if field.type == field.TYPE_MESSAGE:
        _change_(rng.choice(value) if repeated else value, rng)
        return
    now = value[0] if repeated else value
    if isinstance(now, bytes):
        other: Any = damaged(rng.choice(list(value)) if repeated else value, rng)
    elif isinstance(now, str):
        given = rng.choice(list(value)) if repeated else value
        other = rng.choice(("", "x", "Conv", "Loop", "MatMul", "Resize", "Tile", given + "1", given[:-1]))
    elif isinstance(now, float):
        other = rng.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    else:
        other = rng.choice((*_NUMBERS[:10], -1, 2**31 - 1, *((2**31, 2**62) if "INT64" in _kind(field) else ())))
    with contextlib.suppress(ValueError, TypeError):
        if repeated:
            value[rng.randrange(len(value))] = other
        else:
            setattr(message, field.name, other)


def _kind(field: Any) -> str:
    return "INT64" if field.type == field.TYPE_INT64 else ""


class IdxFormat(Format):
    def make(self) -> list[bytes]:
        pixels = (np.arange(5 * 7 * 6) * 31 % 251).astype(np.uint8)
        plain = [
            struct.pack(">HBB3I", 0, 8, 3, 5, 7, 6) + pixels.tobytes(),
            struct.pack(">HBB1I", 0, 8, 1, 9) + bytes(range(9)),
        ]
        return [*plain, *(gzip.compress(content, mtime=0) for content in plain)]

    def mutate(self, rng: random.Random) -> bytes:
        content = super().mutate(rng)
        if rng.random() < 0.3:
            return gzip.compress(damaged(rng.choice(self.inputs[:2]), rng), mtime=0)
        if rng.random() < 0.05:
            return gzip.compress(rng.choice(self.inputs[:2]) + bytes(1 << 22), mtime=0)
        return content

    def check(self, path: Path) -> str:
        from project.data.sets.idx import read_idx

        refused, values = _refuses(lambda: read_idx(path))
        if refused:
            return "refused"
        content = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()
        raw = path.read_bytes()
        whole = zlib.decompressobj(31).decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        _expect(content == whole, "it would be written otherwise")
        return "same"


class CifarFormat(Format):
    def make(self) -> list[bytes]:
        pixels = (np.arange(4 * 3072) * 31 % 251).astype(np.uint8).reshape(4, 3072)
        self.entries: dict[Any, Any] = {
            **{b"batch_label": b"test", b"labels": [0, 9, 3, 3], b"data": pixels},
            b"filenames": [b"a.png", b"b.png", b"c.png", b"d.png"],
        }
        pickles = [pickle.dumps(self.entries, protocol=protocol) for protocol in (2, 2, 4, 5)]
        # Most of a file is pixels, which are all alike to the reader: a file with few of them is damaged elsewhere.
        few = {**self.entries, b"labels": [7], b"data": pixels[:1]}
        return [*pickles, *(pickle.dumps(few, protocol=protocol) for protocol in (2, 3, 4))]

    def mutate(self, rng: random.Random) -> bytes:
        match rng.randrange(4):
            case 0:
                return super().mutate(rng)
            case 1:
                content = rng.choice(self.inputs)
                start = rng.randrange(400)
                return damaged(content[: start + 60], rng) + content[start + 60 :]
            case 2:
                content = rng.choice(self.inputs)
                place = rng.choice((rng.randrange(500), len(content) - 1 - rng.randrange(200)))
                return (
                    content[:place]
                    + bytes([rng.choice(b"0123456789()[]{}tRbdlNK.qhjrcs\x85\x86\x87\x88\x93\x94\x96")])
                    + content[place + 1 :]
                )
        entries = dict(self.entries)
        key = rng.choice(list(entries))
        kinds = ("int8", "float32", "object", ">i8", "U3", "bool", "complex64")
        odd = [np.zeros((4, 3072)).astype(rng.choice(kinds)), np.float64(3), np.arange(3), [0, 1, 2, np.int64(3)]]
        labels: tuple[Any, ...] = (-1, 10, 10**30, 2.5, "3", None, True, [], {})
        odd += [[0, 9, 3, label] for label in labels]
        entries[key] = rng.choice((*NASTY, *odd))
        if rng.random() < 0.3:
            entries[rng.choice((b"\xff", 3, "data", None, (1, 2)))] = entries.pop(key)
        return pickle.dumps(rng.choice((entries, entries, entries, [entries], None)), protocol=rng.choice((1, 2, 4, 5)))

    def check(self, path: Path) -> str:
        from project.data import CIFAR10

        data = CIFAR10(data_dir=str(self.folder))
        refused, answer = _refuses(lambda: data._read(path, ""))
        if refused:
            return "refused"
        images, labels = answer
        _expect(images.dtype == torch.uint8 and images.shape == (len(labels), 3, 32, 32), "no images")
        entries = {"data": images.numpy().reshape(-1, 3072), "labels": labels.tolist()}
        again = path.with_name("again")
        again.write_bytes(pickle.dumps(entries, protocol=2))
        other = data._read(again, "")
        _expect(torch.equal(other[0], images) and torch.equal(other[1], labels), "another answer")
        return "same"


class ImageFormat(Format):
    suffix = ".png"

    def make(self) -> list[bytes]:
        from PIL import Image

        ramp = (np.arange(24 * 20 * 3) * 31 % 251).astype(np.uint8).reshape(24, 20, 3)
        images = {
            "RGB": Image.fromarray(ramp),
            "L": Image.fromarray(ramp[..., 0]),
            "P": Image.fromarray(ramp).convert("P"),
            "I;16": Image.fromarray(ramp[..., 0].astype(np.uint16) * 257),
        }
        saved = [("RGB", kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
        saved += [("L", "PNG"), ("P", "PNG"), ("P", "GIF"), ("I;16", "PNG"), ("I;16", "TIFF"), ("L", "TIFF")]
        contents = []
        for mode, kind in saved:
            stream = io.BytesIO()
            exif = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}
            images[mode].save(stream, kind, **(exif if kind in ("JPEG", "WEBP", "PNG") else {}))
            contents.append(stream.getvalue())
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
            stream = io.BytesIO()
            images["RGB"].save(stream, "TIFF", compression=compression)
            contents.append(stream.getvalue())
        contents.append(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>')
        contents.append(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
        return contents

    def mutate(self, rng: random.Random) -> bytes:
        content = super().mutate(rng)
        if content[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.7:
            return _png_with_checksums(content)
        if rng.random() < 0.02:
            sides = rng.choice(_NUMBERS), rng.choice(_NUMBERS)
            return b"P6 %d %d 255 " % sides + content
        return content

    def check(self, path: Path) -> str:
        from PIL import Image

        from project.data import decode_image

        refused, image = _refuses(lambda: decode_image(path, (3, 16, 16)))
        if refused:
            return "refused"
        again = path.with_name("again.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(again)
        _expect(torch.equal(decode_image(again, (3, 16, 16)), image), "another answer")
        return "same"


def _png_with_checksums(content: bytes) -> bytes:
    """A PNG file with the right checksum of each of its parts."""
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        body = content[place + 4 : place + 8 + length]
        parts.append(content[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + length
    return b"".join(parts)


class YamlFormat(Format):
    suffix = ".yaml"

    def make(self) -> list[bytes]:
        folder = Path(__file__).resolve().parents[1] / "configs"
        return [path.read_bytes() for path in sorted(folder.glob("*.yaml"))]

    def mutate(self, rng: random.Random) -> bytes:
        content = rng.choice(self.inputs)
        if rng.random() < 0.3:
            return damaged(content, rng)
        lines = content.decode().splitlines()
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(len(lines) or 1)
            line = lines[place] if lines else ""
            key = line.partition(":")[0]
            match rng.randrange(7):
                case 0:
                    lines.insert(place, line)
                case 1:
                    lines[place : place + 1] = []
                case 2:
                    lines[place : place + 1] = [f"{key}: {rng.choice(_VALUES)}"]
                case 3:
                    lines[place : place + 1] = [
                        rng.choice(("  ", "\t", " - ", "? ", "!!python/object ", "&a ", "*a ")) + line
                    ]
                case 4:
                    lines[place : place + 1] = [line.replace(rng.choice(line or " "), rng.choice(_CHARACTERS))]
                case 5:
                    other = rng.randrange(len(lines) or 1)
                    lines[place : place + 1], lines[other : other + 1] = (
                        lines[other : other + 1],
                        lines[place : place + 1],
                    )
                case 6:
                    lines.insert(place, " " * rng.randrange(7) + rng.choice(_VALUES))
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    def check(self, path: Path) -> str:
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                refused, text = _refuses(lambda: _parse(path))
        except SystemExit as error:
            words = stderr.getvalue()
            _expect(error.code == 2, f"exit status {error.code}")
            _expect(len(words.strip().splitlines()) == 1 and len(words) < 8000, f"no sentence: {words!r}")
            return "refused"
        if refused:
            return "refused"
        again = path.with_name("again.yaml")
        again.write_text(text, encoding="utf-8")
        _expect(_parse(again) == text, "another answer")
        return "same"


_VALUES = (
    *("null", "true", "-1", "0", "1e400", ".nan", ".inf", "[]", "{}", "[[[[]]]]", "''", '"\\u0000"', "&a [*a]", "*a"),
    *("!!python/object/apply:os.system [true]", "!!binary aGk=", "2026-01-01", "0x10", "1_000", "99999999999999999999"),
    *("os.system", "torch.nn.Linear", "project.models.NoNorm", "{class_path: os.system}", "{a: 1, a: 2}", "---", "..."),
    *("[" * 500, "- " * 300, "a: " * 300, "x" * 5000, "é", "\ud83d", "|", ">", "%YAML 9.9", "!!set {a, b}", "<<: *a"),
)
_CHARACTERS = ("", ":", "\t", "#", "'", '"', "{", "[", "\0", "\u2028", "-", "9", ".", "é", "\r")


@cache
def _parser() -> Any:
    """The parser of the command line, built once: this takes most of the time."""
    from project.frame.cli import CLI

    class Parsed(CLI):
        """The command line up to the configuration. Nothing is built, and nothing runs."""

        def before_instantiate_classes(self) -> None: ...

        def instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

    return Parsed(["fit", "--data=project.data.Digits", "--model.net=project.models.SmallInception"])


def _parse(path: Path) -> str:
    """The whole configuration of ``project fit --config PATH``, as a run saves it."""
    from project.frame.cli import whole_config

    cli = _parser()
    cli.parse_arguments(cli.parser, ["fit", "--config", str(path)])
    return whole_config(cli._parser("fit"), cli.config["fit"])


FORMATS: dict[str, type[Format]] = {
    "packed": PackedFormat,
    "checkpoint": CheckpointFormat,
    "onnx": OnnxFormat,
    "idx": IdxFormat,
    "cifar": CifarFormat,
    "image": ImageFormat,
    "yaml": YamlFormat,
}
