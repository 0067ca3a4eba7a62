"""Which of a run's model files is its result: the fastest on this machine among those that are accurate enough.

Int8 is much faster than fp32 on processors with VNNI and hardly faster on others, and layers that stay in fp32 may cost
more time than the others save. So the files are timed, in each engine that is installed.
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


@dataclass(frozen=True)
class FastestFile:
    """The result of a run.

    Args:
        file: name of the file in the run's folder.
        engine: what runs it fastest on this machine.
        latency_ms: median time for 64 images, in milliseconds.
        latencies_ms: the same for every file in every engine, by "file, engine".
        processor: what the processor of this machine can do, as :func:`cpu_abilities` says it.
    """

    file: str
    engine: str
    latency_ms: float
    latencies_ms: Mapping[str, float]
    processor: str

    def sentence(self) -> str:
        """What was chosen, and what it holds for."""
        others = ", ".join(f"{name}: {time:.3g}" for name, time in self.latencies_ms.items())
        return (
            f"The result of this run is {self.file}: of the files that are accurate enough it is the fastest on this "
            f"processor ({self.processor}), with {self.latency_ms:.3g} ms for {BATCH} images in {self.engine}. "
            f"Milliseconds of each: {others}. On another processor another file may be the fastest."
        )


def fastest_file(files: Sequence[Path], image_shape: tuple[int, int, int]) -> FastestFile:
    """Time ONNX files of one net in every engine that is installed, in the same rounds.

    Args:
        files: ONNX files that are accurate enough.
        image_shape: (C, H, W) of the images.
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
    """What ``result.json`` holds; ``None`` without one."""
    return FastestFile(**json.loads(run.result.read_text(encoding="utf-8"))) if run.result.is_file() else None
