"""Compares int8 quantizers after training: this project's, ONNX Runtime's ``quantize_static`` and NNCF's default.

All quantizers get the same fp32 file and the same calibration images. Accuracy is measured on the whole test set. Each
file runs in ONNX Runtime and, if it is installed, in OpenVINO. Times are medians of interleaved rounds. ``--keep``
keeps the files, for example for a measurement on another machine.

    pip install -e '.[openvino]' nncf
    python scripts/studies/quantization.py --runs logs/fashion_mnist/version_0 logs/fashion_mnist/version_1

``--nets`` takes narrow nets of torchvision and timm in place of runs, trains them for some seconds each on digits in
colour, and prints a table by net, with means over the seeds. A net whose fp32 file lies in ``--keep`` is not trained
again. The test images are there nine times, moved by up to one pixel. Times are processor time:

    python scripts/studies/quantization.py --nets

With the following variable OpenVINO computes as on a processor without VNNI instructions. Its times are not those of
such a processor:

    ONEDNN_MAX_CPU_ISA=AVX512_CORE python scripts/studies/quantization.py --runs … --rounds 0
"""

import argparse
import importlib.util
import math
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import torch
import yaml
from scipy.stats import binomtest
from torch import Tensor

from project.data import ImageDataModule
from project.deployment.engines import Engine, onnx_engine, openvino_engine
from project.deployment.export import export_onnx
from project.deployment.int8.observers import Method
from project.deployment.int8.quantizer import Quantizer, quantize
from project.deployment.latency import measure
from project.frame.cli import CLI
from project.frame.paths import Run
from project.learning.checkpoints import load_net

OPENVINO = importlib.util.find_spec("openvino") is not None
NNCF = importlib.util.find_spec("nncf") is not None
ALSO = {
    "4 bits": Quantizer(activations=False, weight_bits=4),
    "no correction": Quantizer(bias_correction=False),
    "min-max": Quantizer(observer="min-max"),
    "full range": Quantizer(reduce_range=False),
}
"""Settings that ``--nets`` compares on request."""


def write_files(fp32: Path, calibration: np.ndarray) -> dict[str, Path]:
    """Write an int8 file with each quantizer beside the fp32 file; return all files by name."""
    files = {"fp32": fp32}
    quantizers = {observer: Quantizer(observer=observer, bias_correction=False) for observer in get_args(Method)}
    quantizers["mse, full range"] = Quantizer(reduce_range=False, bias_correction=False)
    quantizers["bias correction"] = Quantizer(bias_correction=True)
    quantizers["mean-min-max, bias correction"] = Quantizer(observer="mean-min-max", bias_correction=True)
    quantizers["4-bit weights"] = Quantizer(
        activations=False, weight_bits=4, weight_observer="mse", bias_correction=False, eight_bit_share=0
    )
    quantizers["4-bit weights, default"] = Quantizer(activations=False, weight_bits=4)
    quantizers["4-bit weights, bias correction"] = replace(quantizers["4-bit weights"], bias_correction=True)
    for name, quantizer in quantizers.items():
        files[f"project, {name}"] = fp32.with_name(f"{name}.onnx")
        onnx.save(quantize(onnx.load(fp32), calibration, quantizer)[0], files[f"project, {name}"])
    for name, reduce_range in (("quantize_static", False), ("quantize_static, reduce_range", True)):
        files[name] = fp32.with_name(f"{name}.onnx")
        quantize_static(fp32, files[name], calibration, reduce_range)
    if NNCF:
        files["NNCF"] = fp32.with_name("nncf.onnx")
        quantize_nncf(fp32, files["NNCF"], calibration)
    return files


def quantize_static(source: Path, target: Path, calibration: np.ndarray, reduce_range: bool) -> None:
    """Quantize with ONNX Runtime.

    The settings are those that its documentation advises for convolutional nets on x86: QDQ, u8s8, per channel.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[np.ndarray] = iter(np.array_split(calibration, -(-len(calibration) // 64)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantization.quantize_static(
        str(source),
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )


def quantize_nncf(source: Path, target: Path, calibration: np.ndarray) -> None:
    import nncf

    data = nncf.Dataset([image[None] for image in calibration], lambda image: {"images": image})
    onnx.save(nncf.quantize(onnx.load(source), data, subset_size=len(calibration)), target)


def compare_foreign(args: argparse.Namespace) -> None:
    """Train nets of torchvision and timm, quantize them, and print a table with fp32, our default files and NNCF's.

    Raises:
        ImportError: if timm is not installed.
    """
    from foreign_nets import NETS, ColourDigits, trained

    data = ColourDigits()
    data.setup("validate")
    data.setup("test")
    images, labels = moved(*test_images(data))
    calibration = data.sample(args.images)[0].contiguous().numpy()
    print("| net | file | bytes | engine | accuracy, % | each | as fp32, % | ms, 64 images |")  # noqa: T201
    print("| --- | --- | ---: | --- | ---: | --- | ---: | ---: |")  # noqa: T201
    for name in args.nets or NETS:
        rows: dict[str, list[list[float]]] = {}
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as temporary:
                folder = args.keep / f"{name}-{seed}" if args.keep else Path(temporary)
                folder.mkdir(parents=True, exist_ok=True)
                if not (fp32 := folder / "fp32.onnx").is_file():
                    net = trained(name, data, 3 * args.epochs if "ViT" in name else args.epochs, seed)
                    export_onnx(net, fp32, data.image_shape)
                files = foreign_files(fp32, calibration, args.also)
                makers = {"ONNX Runtime": onnx_engine} | ({"OpenVINO": openvino_engine} if OPENVINO else {})
                engines = {
                    f"{file} | {kind}": make(path) for kind, make in makers.items() for file, path in files.items()
                }
                classes = {slot: classes_of(engine, images) for slot, engine in engines.items()}
                times = cpu_times(engines, images, args.rounds)
                for slot, found in classes.items():
                    same = classes["fp32 | ONNX Runtime"] == found
                    row = [
                        files[slot.partition(" | ")[0]].stat().st_size,
                        100 * float((found == labels).double().mean()),
                    ]
                    rows.setdefault(slot, []).append([*row, 100 * float(same.double().mean()), times[slot]])
        for slot, runs in rows.items():
            file, _, kind = slot.partition(" | ")
            size, accuracy, same, duration = (statistics.mean(column) for column in zip(*runs, strict=True))
            each = " ".join(f"{run[1]:.2f}" for run in runs)
            cells = [
                name,
                file,
                f"{round(size):,}",
                kind,
                f"{accuracy:.2f}",
                each,
                f"{same:.2f}",
                f"{duration:.2f}",
            ]
            print("|", " | ".join(cells), "|", flush=True)  # noqa: T201


def foreign_files(fp32: Path, calibration: np.ndarray, also: list[str]) -> dict[str, Path]:
    """Write the quantized files of one net beside the fp32 file; return all files by name."""
    files = {"fp32": fp32}
    for file in ("int8", *also):
        files[file] = fp32.with_name(f"{file}.onnx")
        onnx.save(quantize(onnx.load(fp32), calibration, ALSO.get(file, Quantizer()))[0], files[file])
    if NNCF:
        files["NNCF"] = fp32.with_name("nncf.onnx")
        if not files["NNCF"].is_file():
            quantize_nncf(fp32, files["NNCF"], calibration)
    return files


def moved(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nine copies of the images, moved by up to one pixel in each direction, and their labels."""
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return torch.cat([images.roll(step, (2, 3)) for step in steps]), labels.repeat(len(steps))


def classes_of(engine: Engine, images: Tensor) -> Tensor:
    return torch.cat([engine(x.contiguous()).argmax(1) for x in images.split(500)])


def cpu_times(engines: dict[str, Engine], images: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of one call with 64 images, for each engine.

    Each is the median of interleaved rounds. Other programs hardly change the processor time. With several threads it
    is the sum over all of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            engine(images[:64])
            start = time.process_time()
            engine(images[:64])
            samples[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(times) if times else math.nan for name, times in samples.items()}


def test_images(data: ImageDataModule) -> tuple[Tensor, Tensor]:
    """All normalised test images and their labels."""
    assert data.test_data is not None
    pixels, labels, _ = data.test_data.__getitems__(list(range(len(data.test_data))))
    return data.normalize(pixels.float().div_(255)), labels


def right_answers(engine: Engine, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the engine finds the right class, for each image: ``[N]``."""
    return classes_of(engine, images) == labels


def compare_pairs(right: dict[str, list[Tensor]]) -> None:
    """Compare each quantizer with NNCF in the same engine.

    The p value is that of McNemar's exact test on the images that only one of the two classifies correctly.
    """
    print("| file | engine | right where NNCF is wrong | wrong where NNCF is right | p |")  # noqa: T201
    print("| --- | --- | ---: | ---: | ---: |")  # noqa: T201
    for name, answers in right.items():
        maker, _, engine = name.partition(" | ")
        other = right.get(f"NNCF | {engine}")
        if other is None or maker == "NNCF":
            continue
        ours, theirs = torch.cat(answers), torch.cat(other)
        better, worse = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        print(f"| {maker} | {engine} | {better} | {worse} | {p:.2f} |")  # noqa: T201


def load(run: Run) -> tuple[torch.nn.Module, ImageDataModule]:
    config = yaml.safe_load(run.config.read_text())
    cli = CLI({key: config[key] for key in ("model", "data")}, run=False)
    data = cli.datamodule
    data.prepare_data()
    data.setup("validate")
    data.setup("test")
    return load_net(cli.model, run.weights()), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", help="folders of trained runs")
    parser.add_argument("--nets", nargs="*", help="nets of foreign_nets.py to train and compare; none: all")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of --nets; transformers take three times as many")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the training of --nets")
    parser.add_argument("--also", nargs="+", choices=list(ALSO), default=[], help="more files for --nets")
    parser.add_argument("--images", type=int, default=512, help="number of calibration images")
    parser.add_argument("--rounds", type=int, default=30, help="number of timing rounds; 0 measures no times")
    parser.add_argument("--keep", type=Path, help="folder to keep the files in, by run or net and seed")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if (args.runs is None) == (args.nets is None):
        parser.error("give --runs with folders of trained runs, or --nets for nets of torchvision and timm.")
    if args.nets is not None:
        return compare_foreign(args)
    right: dict[str, list[Tensor]] = {}
    times: dict[tuple[str, int], list[float]] = {}
    sizes: dict[str, int] = {}
    for folder in args.runs:
        net, data = load(Run.find(folder))
        images, labels = test_images(data)
        with tempfile.TemporaryDirectory() as temporary:
            fp32 = Path(temporary) / "fp32.onnx"
            export_onnx(net, fp32, data.image_shape)
            files = write_files(fp32, data.sample(args.images)[0].numpy())
            engines = {f"{name} | ONNX Runtime": onnx_engine(path) for name, path in files.items()}
            if OPENVINO:
                engines |= {f"{name} | OpenVINO": openvino_engine(path) for name, path in files.items()}
            sizes |= {name: path.stat().st_size for name, path in files.items()}
            for name, engine in engines.items():
                right.setdefault(name, []).append(right_answers(engine, images, labels))
            if args.keep:
                shutil.copytree(temporary, args.keep / str(len(right["fp32 | ONNX Runtime"])), dirs_exist_ok=True)
            for slot, latency in measure(engines, data.image_shape, rounds=args.rounds).items() if args.rounds else ():
                times.setdefault(slot, []).append(latency.median_ms)
    print(f"{len(args.runs)} runs, {args.images} calibration images, {torch.get_num_threads()} threads")  # noqa: T201
    print("| file | engine | test accuracy, % | each | bytes | ms, batch 1 | ms, batch 64 |")  # noqa: T201
    print("| --- | --- | ---: | --- | ---: | ---: | ---: |")  # noqa: T201
    for name, answers in right.items():
        values = [100 * float(each.double().mean()) for each in answers]
        each = " ".join(f"{value:.2f}" for value in values)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        one, many = (statistics.median(times.get((name, batch), [math.nan])) for batch in (1, 64))
        size = sizes[name.partition(" | ")[0]]
        print(f"| {name} | {statistics.mean(values):.3f}{spread} | {each} | {size:,} | {one:.3f} | {many:.2f} |")  # noqa: T201
    compare_pairs(right)


if __name__ == "__main__":
    main()
