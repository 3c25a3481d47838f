"""Reports: tables on the terminal, in Markdown and in JSON."""

import os
import platform
import random
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


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and where 95 % of those of resampled measurements lie: `0.985 [0.971, 1.002]`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], groups: int = 1) -> "Interval":
        """Bootstrap the median of at least one value; deterministic.

        Args:
            values: one group behind the other, all of the same size.
            groups: of what is more alike than others are; groups are drawn, and values within them.
        """
        rng, size = random.Random(0), len(values) // groups
        parts = [values[i * size : (i + 1) * size] for i in range(groups)]
        medians = sorted(
            statistics.median([value for part in rng.choices(parts, k=groups) for value in rng.choices(part, k=size)])
            for _ in range(2000)
        )
        return cls(statistics.median(values), medians[50], medians[-51])

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
