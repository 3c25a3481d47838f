"""A picture of `bench decode`: speed by requests at once, acceptance by depth, time of a step by its size."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dllm.measure.report import Cell, Row, Section, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = (5.0, 3.6)


def draw(sections: Sequence[Section], path: Path) -> None:
    """Draw the sections of `measure.decode.sections`: a row of panels per policy, and the time of steps below.

    Args:
        sections: speed, acceptance, times of steps; further ones are not drawn.
        path: its suffix, `.svg` or `.png`, chooses the format.
    """
    from matplotlib.figure import Figure

    speed, depths, steps = (section.rows for section in sections[:3])
    policies = list(dict.fromkeys(row["policy"] for row in speed))
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(2 * width, (1 + len(policies)) * height), layout="constrained")
    panels = figure.subplots(1 + len(policies), 2, squeeze=False)
    for policy, (left, right) in zip(policies, panels[:-1], strict=True):
        _draw_speed(left, [row for row in speed if row["policy"] == policy], f"{policy}: speed")
        _draw_depths(right, [row for row in depths if row["policy"] == policy], f"{policy}: acceptance by depth")
    _draw_steps(panels[-1, 0], steps)
    panels[-1, 1].set_axis_off()
    figure.savefig(path)


def _draw_speed(axes: "Axes", rows: Sequence[Row], title: str) -> None:
    for variant, of_variant in _by(rows, "drafts").items():
        at_once = [str(row["at once"]) for row in of_variant]
        spreads = [spread for row in of_variant if isinstance(spread := row["ratio"], Spread)]
        axes.plot(at_once, [spread.median for spread in spreads], marker="o", label=variant)
        axes.fill_between(at_once, [s.least for s in spreads], [s.most for s in spreads], alpha=0.15)
    axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    _label(axes, title, "requests at once", "tokens/s as multiple of off")


def _draw_depths(axes: "Axes", rows: Sequence[Row], title: str) -> None:
    for row in rows:
        shares = {int(name): _number(share) for name, share in row.items() if name.isdecimal()}
        axes.plot(list(shares), list(shares.values()), marker="o", label=str(row["drafts"]))
    axes.set_ylim(bottom=0)
    _label(axes, title, "depth", "share of forwards")


def _draw_steps(axes: "Axes", rows: Sequence[Row]) -> None:
    for engine, of_engine in _by(rows, "engine").items():
        rows_of_step, ms = ([_number(row[name]) for row in of_engine] for name in ("rows", "ms"))
        axes.scatter(rows_of_step, ms, s=12, label=engine)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _label(axes, "time of a step", "rows of the step", "ms")


def _number(cell: Cell) -> float:
    assert isinstance(cell, int | float), "a column of numbers"
    return cell


def _by(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row[name])].append(row)
    return groups


def _label(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
