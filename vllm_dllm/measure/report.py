"""Reports: tables on the terminal, in Markdown and in JSON."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing: `1.30 (1.21 to 1.34)`."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 2
        return f"{self.median:.{digits}f} ({self.least:.{digits}f} to {self.most:.{digits}f})"


Cell = str | int | float | Spread
Row = Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Section:
    """A table; its rows have the same keys."""

    title: str
    rows: Sequence[Row]


def cell_text(value: Cell) -> str:
    """Format a cell; floats get two decimals."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def to_markdown(sections: Sequence[Section]) -> str:
    """Format tables, each under its title."""
    return "\n\n".join(f"{section.title}:\n\n{_table(section.rows)}" for section in sections if section.rows) + "\n"


def _table(rows: Sequence[Row]) -> str:
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([cell_text(row[key]) for key in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Describe the machine in a line."""
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as cpuinfo:
        models = [line.partition(": ")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return f"{models[0] if models else name}, {os.cpu_count()} cores, torch {torch.__version__}"
