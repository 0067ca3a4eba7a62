"""Compares the C kernels with torch's own operations, forward and backward, on the feature maps of a net.

Kernel and torch operation run in turn on the same map, ``--rounds`` times. For each operation the script prints both
medians in milliseconds, and the median and the quartiles of the ratio (kernel time / torch time). The first layer is
measured as a whole: against torch's operations, and, below the sum, against torch's convolution followed by the kernel
for batch norm with ReLU and the kernel for max pooling.

    python scripts/benchmark_kernels.py --config configs/fashion_mnist.yaml --threads 1
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from project.frame.cli import CLI
from project.models.kernels import batch_norm_relu, batch_norm_relu_pool, first_layer, max_pool
from project.models.layers import ConvNormAct, MaxPool

Operation = Callable[[Tensor], Tensor | None]
Row = tuple[str, Tensor, Operation, Operation]
"""Name, input, the kernel, and the operation that it is compared with."""


def find_first(net: nn.Module, images: Tensor) -> ConvNormAct | None:
    """The layer that receives the images; ``None`` if there is no kernel for it."""
    layer = next((module for module in net.modules() if isinstance(module, ConvNormAct)), None)
    if layer is None or first_layer(images, layer.conv, layer.norm, layer.act, getattr(layer, "pool", None)) is None:
        return None
    return layer


def first_layers(layer: ConvNormAct, images: Tensor, autocast: torch.autocast) -> list[Row]:
    """Rows that compare the net's first layer with torch's operations and with the other kernels."""
    conv, norm, relu, pool = layer.conv, layer.norm, layer.act, getattr(layer, "pool", nn.Identity())

    def whole(x: Tensor) -> Tensor | None:
        with autocast:
            return first_layer(x, conv, norm, relu, getattr(layer, "pool", None))

    def one_by_one(x: Tensor) -> Tensor:
        with autocast:
            y = batch_norm_relu(conv(x), norm, relu)
            assert y is not None, "there is no kernel for this map"
            return pool(y)

    def plain(x: Tensor) -> Tensor:
        with autocast:
            y = relu(norm(conv(x)))
            return super(MaxPool, pool).forward(y) if isinstance(pool, MaxPool) else pool(y)

    name = f"first layer {'x'.join(map(str, images.shape))}"
    return [(name, images, whole, plain), (f"{name}, see above", images, whole, one_by_one)]


def torch_pool(pool: nn.Module) -> nn.MaxPool2d:
    assert isinstance(pool, nn.MaxPool2d)
    return nn.MaxPool2d(pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


def operations(net: nn.Module, images: Tensor, first: nn.Module | None) -> list[Row]:
    """A row for each distinct batch norm and max pooling of the net after the first layer.

    The pooling of a layer is measured together with the layer's norm.
    """
    found: dict[str, Row] = {}
    relu = nn.ReLU(inplace=True)
    layers = [module for module in net.modules() if isinstance(module, ConvNormAct) and hasattr(module, "pool")]
    pools = {layer.norm: layer.pool for layer in layers}

    def note(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        x = args[0].detach()
        shape = "x".join(map(str, x.shape))
        if isinstance(module, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(x.shape[1])
            if module in pools:
                name, pool = f"batch norm + ReLU + max pool {shape}", torch_pool(pools[module])
                fused = partial(batch_norm_relu_pool, norm=norm, activation=relu, pool=pool)
                found[name] = (name, x, fused, lambda x: pool(relu(norm(x))))
            else:
                name = f"batch norm + ReLU {shape}"
                found[name] = (name, x, lambda x: batch_norm_relu(x, norm, relu), lambda x: relu(norm(x)))
        elif isinstance(module, nn.MaxPool2d) and module not in pools.values():
            plain = torch_pool(module)
            name = f"max pool {module.kernel_size}, stride {module.stride} {shape}"
            found[name] = (name, x, lambda x: max_pool(x, plain), plain)

    behind = set(net.modules()) - set(first.modules() if first is not None else ())
    handles = [module.register_forward_hook(note) for module in behind]
    net(images)
    for handle in handles:
        handle.remove()
    return list(found.values())


def milliseconds(operation: Operation, x: Tensor, grad: Tensor) -> float:
    x.grad = None
    start = time.perf_counter()
    y = operation(x)
    assert y is not None, "there is no kernel for this map"
    y.backward(grad)
    return 1e3 * (time.perf_counter() - start)


def compare(row: Row, rounds: int) -> tuple[float, float]:
    """Measure one row, print it, and return the medians in ms: kernel, torch."""
    name, x, kernel, plain = row
    grad = torch.randn_like(plain(x))  # type: ignore[arg-type]
    for operation in (kernel, plain):
        milliseconds(operation, x, grad)
    times = [(milliseconds(kernel, x, grad), milliseconds(plain, x, grad)) for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    low, middle, high = statistics.quantiles([one / other for one, other in times], n=4)
    print(f"{name:48s} {ours:6.2f} ms {theirs:6.2f} ms   {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)  # noqa: T201
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default="configs/fashion_mnist.yaml", help="configuration of the net and the batch size"
    )
    parser.add_argument("--rounds", type=int, default=50, help="number of measurements of each operation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cli = CLI(["--config", args.config], run=False)
    data, net = cli.datamodule, cli.model.net.to(memory_format=torch.channels_last).train()
    images = torch.randn(data.batch_size, *data.image_shape).contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=cli.trainer.precision == "bf16-mixed")
    first = find_first(net, images)
    with autocast:
        rows = operations(net, images, first)
    firsts = [] if first is None else first_layers(first, images, autocast)
    print(f"{'forward + backward':48s} {'kernel':>9s} {'torch':>9s}   ratio")  # noqa: T201
    for _, x, _, _ in rows:
        x.requires_grad_()
    times = [compare(row, args.rounds) for row in [*firsts[:1], *rows]]
    ours, theirs = map(sum, zip(*times, strict=True))
    print(f"{'sum':48s} {ours:6.2f} ms {theirs:6.2f} ms   {ours / theirs:.2f}")  # noqa: T201
    for row in firsts[1:]:
        compare(row, args.rounds)


if __name__ == "__main__":
    main()
