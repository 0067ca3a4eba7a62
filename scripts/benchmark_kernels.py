"""The kernels against torch's own operations, forward and backward, on the maps of a net: milliseconds and ratios.

Both run in turn on the same map, as often as ``--rounds`` says; the medians and the spread of the rounds' ratios.

    python scripts/benchmark_kernels.py --config configs/fashion_mnist.yaml --threads 1
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from project.cli import CLI
from project.kernels import batch_norm_relu, max_pool

Operation = Callable[[Tensor], Tensor | None]


def operations(net: nn.Module, images: Tensor) -> list[tuple[str, Tensor, Operation, Operation]]:
    """Each distinct batch norm and pool of the net: name, its input, the kernel, torch's."""
    found: dict[str, tuple[str, Tensor, Operation, Operation]] = {}
    relu = nn.ReLU(inplace=True)

    def note(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        x = args[0].detach()
        shape = "x".join(map(str, x.shape))
        if isinstance(module, nn.BatchNorm2d):
            norm = nn.BatchNorm2d(x.shape[1])
            name = f"batch norm + ReLU {shape}"
            found[name] = (name, x, lambda x: batch_norm_relu(x, norm, relu), lambda x: relu(norm(x)))
        elif isinstance(module, nn.MaxPool2d):
            plain = nn.MaxPool2d(module.kernel_size, module.stride, module.padding, ceil_mode=module.ceil_mode)
            name = f"max pool {module.kernel_size}, stride {module.stride} {shape}"
            found[name] = (name, x, lambda x: max_pool(x, plain), plain)

    handles = [module.register_forward_hook(note) for module in net.modules()]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion_mnist.yaml")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cli = CLI(["--config", args.config], run=False)
    data, net = cli.datamodule, cli.model.net.to(memory_format=torch.channels_last).train()
    images = torch.randn(data.batch_size, *data.image_shape).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=cli.trainer.precision == "bf16-mixed"):
        rows = operations(net, images)
    totals = [0.0, 0.0]
    print(f"{'forward + backward':48s} {'kernel':>9s} {'torch':>9s}   ratio")  # noqa: T201
    for name, x, kernel, plain in rows:
        x.requires_grad_()
        grad = torch.randn_like(plain(x))  # type: ignore[arg-type]
        for operation in (kernel, plain):
            milliseconds(operation, x, grad)
        times = [(milliseconds(kernel, x, grad), milliseconds(plain, x, grad)) for _ in range(args.rounds)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        totals = [totals[0] + ours, totals[1] + theirs]
        low, middle, high = statistics.quantiles([one / other for one, other in times], n=4)
        print(f"{name:48s} {ours:6.2f} ms {theirs:6.2f} ms   {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)  # noqa: T201
    print(f"{'sum':48s} {totals[0]:6.2f} ms {totals[1]:6.2f} ms   {totals[0] / totals[1]:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
