"""Tables of measured rows, as CSV and as Markdown, and how numbers are written in them."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def write_csv(rows: Sequence[Any], kind: type, path: Path) -> None:
    """Write one line for each row, an instance of the dataclass ``kind``. ``None`` becomes an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_number(value: float | None, spec: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{spec}}{unit}"


def write_latency(median: float | None, p05: float | None, p95: float | None) -> str:
    """Three significant digits of the median, and as many decimals of the percentiles: "1.23 (1.20-1.31)"."""
    if median is None:
        return ""
    decimals = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 2
    spread = "" if p05 is None or p95 is None else f" ({p05:.{decimals}f}-{p95:.{decimals}f})"
    return f"{median:.{decimals}f}{spread}"
