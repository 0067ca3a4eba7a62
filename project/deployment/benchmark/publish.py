"""The outputs of ``project benchmark``: CSV, Markdown and a picture in the run's folder, entries in TensorBoard, and a
table on the terminal.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from project.deployment.benchmark.rows import BenchmarkRow, slow_files, to_markdown, to_short_table
from project.deployment.engines import unavailable
from project.deployment.table import write_csv
from project.frame.environment import describe_environment
from project.frame.paths import Run, write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


def publish(rows: Sequence[BenchmarkRow], run: Run | None, command: str, writer: "SummaryWriter | None" = None) -> None:
    """Write ``benchmark.csv``, ``.md`` and ``.png`` into the run's folder, and show the table on the terminal.

    Args:
        rows: rows that :func:`project.deployment.benchmark.measure.benchmark` returned.
        run: run whose folder the files are written to; ``None`` writes none.
        command: command that repeats the benchmark; the Markdown file shows it.
        writer: TensorBoard's writer, which gets the table and the picture too; ``None`` leaves TensorBoard out.
    """
    from PIL import Image

    from project.deployment.report_plots import plot_benchmark
    from project.frame.plots import figure_to_image

    title = f"Benchmark of {', '.join(dict.fromkeys(row.run for row in rows))}"
    left_out = "; ".join(f"{name} ({reason})" for name, reason in unavailable().items())
    notes = [*slow_files(rows), *([f"Not on this machine: {left_out}."] if left_out else [])]
    text = to_markdown(rows, title, _facts(rows, command), notes)
    pixels = figure_to_image(plot_benchmark(rows), dpi=130)
    if run is not None:
        write_whole(run.benchmark("csv"), lambda part: write_csv(rows, BenchmarkRow, part))
        write_whole(run.benchmark("md"), lambda part: part.write_text(text, encoding="utf-8"))
        write_whole(run.benchmark("png"), Image.fromarray(pixels).save)
    if writer is not None:
        writer.add_text("benchmark", text)
        writer.add_image("benchmark", pixels, dataformats="HWC")
        writer.flush()
    _show(rows)
    for sentence in slow_files(rows):
        log.info(sentence)
    if run is not None:
        log.info("written        %s (also .csv, .png)", run.benchmark("md"))


def how_to_repeat(**options: object) -> str:
    """The command line with these options. An option that is ``None`` is left out."""
    words = ["project", "benchmark"]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _facts(rows: Sequence[BenchmarkRow], command: str) -> dict[str, str]:
    environment = describe_environment()
    measured = next(row for row in rows if row.num_rounds)
    packages = {"python": environment["python"], **environment["packages"]}
    threads, cores = _count(measured.num_threads, "thread"), _count(environment["num_cores"], "core")
    gpus = f"; {', '.join(environment['gpus'])}" if environment["gpus"] else ""
    return {
        "machine": f"{environment['cpu']} ({environment['cpu_abilities']}), {threads} on {cores}{gpus}",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "rounds": f"{measured.num_rounds}, engines interleaved, after a warm-up",
        "images": f"{measured.num_images} of the test set",
        "how to repeat": f"`{command}`",
    }


def _count(number: int | None, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _show(rows: Sequence[BenchmarkRow]) -> None:
    """Show a rich table on a terminal, and aligned lines elsewhere. A line above holds what all engines share."""
    log.info("")
    for row in {row.run: row for row in rows}.values():
        counts = (row.num_parameters, row.num_nonzero, row.macs)
        log.info("%s: %s parameters, %s nonzero, %s MACs", row.run, *(f"{count:,}" for count in counts))
    heads, cells = to_short_table(rows)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for head in heads:
            table.add_column(head, justify="left" if head in ("run", "engine") else "right")
        for line in cells:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in [heads, *cells]:
        padded = [
            cell.ljust(width) if head in ("run", "engine") else cell.rjust(width)
            for head, cell, width in zip(heads, line, widths, strict=True)
        ]
        log.info("  ".join(padded).rstrip())
