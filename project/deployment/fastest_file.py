"""The result of a run: the model file that is the fastest on this machine among those that are accurate enough.

Int8 is much faster than fp32 on processors with VNNI, and hardly faster on others. In a file with some layers in fp32,
these layers may cost more time than the int8 layers save. So the files are timed in each engine that is installed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from project.deployment.engines import FILE_ENGINES, why_missing
from project.deployment.latency import measure
from project.frame.environment import cpu_abilities
from project.frame.paths import Run, write_whole

BATCH = 64
"""Number of images in a timed call."""


@dataclass(frozen=True)
class FastestFile:
    """The fastest model file of a run, and the times that it was chosen by.

    Example::

        >>> from project.deployment import FastestFile
        >>> times = {"model.onnx, onnxruntime": 6.1, "model_int8.onnx, onnxruntime": 2.4}
        >>> result = FastestFile("model_int8.onnx", "onnxruntime", 2.4, times, "AVX-512 VNNI")
        >>> result.sentence()
        'The result of this run is model_int8.onnx: ...'

    Args:
        file: name of the file in the run's folder.
        engine: name of the engine that runs the file fastest on this machine.
        latency_ms: median time for 64 images in this engine, in milliseconds; above 0.
        latencies_ms: median time for 64 images, in milliseconds, of every file in every engine; the keys are
            "file, engine".
        processor: abilities of this machine's processor, as :func:`project.frame.environment.cpu_abilities` returns
            them.
    """

    file: str
    engine: str
    latency_ms: float
    latencies_ms: Mapping[str, float]
    processor: str

    def sentence(self) -> str:
        """The choice in words, for the report: the file, its time, and the processor that this holds for."""
        others = ", ".join(f"{name}: {time:.3g}" for name, time in self.latencies_ms.items())
        return (
            f"The result of this run is {self.file}: it is the fastest on this processor ({self.processor}) of the "
            f"files that are accurate enough, with {self.latency_ms:.3g} ms for {BATCH} images in {self.engine}. "
            f"Milliseconds of each: {others}. On another processor another file may be the fastest."
        )


def fastest_file(files: Sequence[Path], image_shape: tuple[int, int, int]) -> FastestFile:
    """Time ONNX files of one net in every engine that is installed, in the same rounds.

    Args:
        files: paths of the ONNX files that are accurate enough; at least one.
        image_shape: shape (C, H, W) of one image.
    """
    names = [name for name in ("onnxruntime", "openvino") if not why_missing(name)]
    engines = {f"{file.name}, {name}": FILE_ENGINES[name](file) for file in files for name in names}
    times = measure(engines, image_shape, batch_sizes=(BATCH,), rounds=30, budget_s=10)
    latencies = {name: times[name, BATCH].median_ms for name in engines}
    best = min(latencies, key=latencies.__getitem__)
    file, _, engine = best.rpartition(", ")
    return FastestFile(file, engine, latencies[best], latencies, cpu_abilities())


def write_result(run: Run, result: FastestFile) -> None:
    """Write ``result.json`` into the run's folder."""
    text = json.dumps(asdict(result), indent=2)
    write_whole(run.result, lambda part: part.write_text(text + "\n", encoding="utf-8"))


def read_result(run: Run) -> FastestFile | None:
    """Read ``result.json`` of the run's folder; ``None`` if there is no such file."""
    return FastestFile(**json.loads(run.result.read_text(encoding="utf-8"))) if run.result.is_file() else None
