"""How long inference takes on the processor, and which engine is the fastest.

An engine is a function of images ``[N, C, H, W]`` (fp32, contiguous) to logits that returns when the logits are there:

- ``eager``: PyTorch as it runs, weights and images in channels-last order;
- ``contiguous``: the same in PyTorch's default order; a poor baseline for convolutions;
- ``compiled``: ``torch.compile``, channels-last;
- ``onnxruntime``: ONNX Runtime on the file of :func:`project.export.export_onnx`.

Turning the images into the order an engine wants counts as the engine's time. A machine's speed drifts, from heat,
clock and neighbours, so engines that shall be compared are measured in one call of :func:`measure`: it runs all of them
in every round, in an order drawn anew, and drift hits all alike. Reported is the median over the rounds with the 5th
and the 95th percentile. All engines use ``torch.get_num_threads()`` threads; set them before building the engines.
"""

import copy
import importlib.util
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor, nn

Engine = Callable[[Tensor], Tensor]
"""Images ``[N, C, H, W]`` -> logits ``[N, num_classes]``."""

PAUSE_S = 0.02
"""Rest before each timed call when there are several threads: those of the engine before spin for a while (OpenMP's
for milliseconds), and would take the cores from the next one."""


@dataclass(frozen=True)
class Latency:
    """Duration of one forward pass of one batch.

    Args:
        median_ms: median over the rounds.
        p05_ms, p95_ms: 5th and 95th percentile over the rounds.
        num_rounds: number of timed calls.
        num_threads: threads an engine may use.
    """

    median_ms: float
    p05_ms: float
    p95_ms: float
    num_rounds: int
    num_threads: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> "Latency":
        """Median and percentiles (linear between samples) of timed calls, with the present number of threads."""
        quantiles = torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64)
        median, p05, p95 = torch.tensor(samples_ms, dtype=torch.float64).quantile(quantiles).tolist()
        return cls(median, p05, p95, len(samples_ms), torch.get_num_threads())


def measure(
    engines: Mapping[str, Engine],
    image_shape: tuple[int, int, int],
    *,
    batch_sizes: Sequence[int] = (1, 64),
    rounds: int = 50,
    budget_s: float | None = None,
    warm_up: int = 3,
    seed: int = 0,
) -> dict[tuple[str, int], Latency]:
    """Time every engine at every batch size, in interleaved rounds.

    Each timed call follows an untimed one of the same engine and batch size, since another has used the caches last.

    Args:
        engines: by name, of one net or of several to compare.
        image_shape: (C, H, W).
        batch_sizes: numbers of images per call.
        rounds: timed calls of each engine at each batch size.
        budget_s: seconds after which no new round begins (there is always one), the warm-up not counted; ``None`` runs
            all rounds.
        warm_up: untimed calls of each engine at each batch size before the first round, at least one; compilation
            happens here.
        seed: of the images (standard normal) and of the order in each round.

    Returns:
        Latencies by (name, batch size).

    Raises:
        ValueError: when nothing is to be measured.
    """
    _check_positive(rounds=rounds, warm_up=warm_up, **{f"batch size {batch}": batch for batch in batch_sizes})
    generator = torch.Generator().manual_seed(seed)
    images = {batch: torch.randn(batch, *image_shape, generator=generator) for batch in batch_sizes}
    slots = [(name, batch) for batch in batch_sizes for name in engines]
    if not slots:
        raise ValueError("engines or batch_sizes is empty, so there is nothing to measure: give at least one of each.")
    for name, batch in slots:
        for _ in range(warm_up):
            engines[name](images[batch])

    samples_ms: dict[tuple[str, int], list[float]] = {slot: [] for slot in slots}
    order, start = random.Random(seed), time.perf_counter()
    for _ in range(rounds):
        for name, batch in order.sample(slots, len(slots)):
            samples_ms[name, batch].append(_time_ms(engines[name], images[batch]))
        if budget_s is not None and time.perf_counter() - start >= budget_s:
            break
    return {slot: Latency.of(samples_ms[slot]) for slot in slots}


def best(latencies: Mapping[tuple[str, int], Latency]) -> dict[int, str]:
    """The engine with the smallest median, by batch size; of the dense fp32 net's engines: the baseline to beat."""
    fastest: dict[int, str] = {}
    for name, batch in sorted(latencies, key=lambda slot: latencies[slot].median_ms):
        fastest.setdefault(batch, name)
    return fastest


def engine(name: str, net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    """An engine on a copy of the net in eval mode, in fp32 on the processor; the net itself is left as it is.

    ``compiled`` takes up to eight batch sizes and compiles for each at its first call (seconds to a minute).

    Args:
        name: ``eager``, ``contiguous``, ``compiled`` or ``onnxruntime``.
        net: takes images ``[N, C, H, W]``.
        image_shape: (C, H, W).

    Raises:
        ValueError: for an unknown name, and for ``onnxruntime`` where it is not installed.
    """
    if name not in _ENGINES:
        raise ValueError(f"engine is {name!r}, but there are only these: {', '.join(_ENGINES)}.")
    if missing := _missing(name):
        raise ValueError(
            f"engine is {name!r}, but {missing} cannot be imported: pip install {' '.join(_PACKAGES[name])}, "
            "or choose eager or compiled."
        )
    return _ENGINES[name](net, image_shape)


def engines(net: nn.Module, image_shape: tuple[int, int, int], names: Sequence[str] | None = None) -> dict[str, Engine]:
    """Engines by name; ``None`` builds all whose packages are installed. Arguments and errors as of :func:`engine`."""
    names = [name for name in _ENGINES if not _missing(name)] if names is None else names
    return {name: engine(name, net, image_shape) for name in names}


def onnx_engine(path: Path) -> Engine:
    """ONNX Runtime on a file with one input and one output, quantized ones too."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run, leave the cores to others
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images_value,), (logits_value,) = session.get_inputs(), session.get_outputs()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([logits_value.name], {images_value.name: images.numpy()})[0])

    return run


def _eager(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_channels_last(net))


def _contiguous(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    return _torch_engine(_copy(net, torch.contiguous_format))


def _compiled(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    forward = _channels_last(net)
    # torch.compile counts compilations per code object and, past eight, runs eagerly with no more than a log line.
    # So every engine has a code object of its own; and fullgraph makes an error of what would run eagerly.
    own = FunctionType(forward.__code__.replace(), forward.__globals__, closure=forward.__closure__)
    return _torch_engine(torch.compile(own, dynamic=False, fullgraph=True))


def _onnxruntime(net: nn.Module, image_shape: tuple[int, int, int]) -> Engine:
    from project.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export_onnx(net, path, image_shape)
        return onnx_engine(path)


_ENGINES: dict[str, Callable[[nn.Module, tuple[int, int, int]], Engine]] = {
    "eager": _eager,
    "contiguous": _contiguous,
    "compiled": _compiled,
    "onnxruntime": _onnxruntime,
}
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript")}


def _missing(name: str) -> str | None:
    """The first package that an engine needs and that is not installed."""
    return next((package for package in _PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None), None)


def _torch_engine(forward: Engine) -> Engine:
    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return forward(images)

    return run


def _channels_last(net: nn.Module) -> FunctionType:
    net = _copy(net, torch.channels_last)

    def forward(images: Tensor) -> Tensor:
        return net(images.contiguous(memory_format=torch.channels_last))

    assert isinstance(forward, FunctionType)
    return forward


def _copy(net: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    return copy.deepcopy(net).eval().to("cpu", torch.float32).to(memory_format=memory_format)


def _time_ms(engine: Engine, images: Tensor) -> float:
    if torch.get_num_threads() > 1:
        time.sleep(PAUSE_S)
    engine(images)
    start = time.perf_counter()
    engine(images)
    return 1000 * (time.perf_counter() - start)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, but it is a count: choose at least 1.")
