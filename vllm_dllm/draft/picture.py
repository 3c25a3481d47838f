"""A picture of a draft graph: nodes by depth, an edge to every parent."""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dllm.draft.graph import DraftGraph, formula_text
from vllm_dllm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")

_COLUMN_INCHES, _ROW_INCHES = 1.7, 0.75
_SMALLEST, _LARGEST = 90.0, 700.0  # areas of a node, points^2

Place = tuple[float, float]
"""Where a node is: depth, and rows above the middle."""


def draw_graph(graph: DraftGraph, path: Path, title: str) -> None:
    """Write a picture; the larger and the brighter a node, the more often it came true.

    Equal graphs give equal files with one version of matplotlib.

    Args:
        graph: at least one node.
        path: its suffix, `.svg` or `.png`, chooses the format.
        title: written above the graph.

    Raises: ConfigError for another suffix, a path that cannot be written, and when matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"picture is {str(path)!r}; allowed are paths that end in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install 'vllm-dllm[tools]'") from None
    places = _places(graph)
    num_rows = 1 + 2 * max(row for _, row in places)
    figure = Figure(figsize=(_COLUMN_INCHES * (1 + max(graph.depths)) + 1, _ROW_INCHES * num_rows + 1))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_axis_off()
    axes.margins(x=0.6 / (1 + max(graph.depths)), y=0.6 / num_rows)
    _draw_edges(axes, graph, places)
    _draw_nodes(axes, graph, places)
    is_svg = path.suffix.lower() == ".svg"
    try:
        with mpl.rc_context({"svg.hashsalt": "draft graph", "svg.fonttype": "none"}):
            # A date would make equal pictures differ.
            figure.savefig(path, bbox_inches="tight", dpi=150, metadata={"Date": None} if is_svg else None)
    except OSError as error:
        raise ConfigError(f"picture {str(path)!r} cannot be written ({error.strerror}); give another path") from None


def _places(graph: DraftGraph) -> list[Place]:
    """Place the root and the nodes: a column per depth, in it by the mean row of the parents, then the best on top."""
    places: list[Place] = [(0.0, 0.0)] * (1 + len(graph))
    for depth in range(1, 1 + max(graph.depths)):
        column = [node for node in range(1, 1 + len(graph)) if graph.depths[node - 1] == depth]
        column.sort(key=lambda node: (-_mean_row(places, graph.parents[node - 1]), node))
        for index, node in enumerate(column):
            places[node] = (float(depth), (len(column) - 1) / 2 - index)
    return places


def _mean_row(places: list[Place], parents: tuple[int, ...]) -> float:
    return sum(places[parent][1] for parent in parents) / len(parents)


def _draw_edges(axes: "Axes", graph: DraftGraph, places: list[Place]) -> None:
    for node, parents in enumerate(graph.parents, start=1):
        for parent in parents:
            (x0, y0), (x1, y1) = places[parent], places[node]
            axes.plot([x0, x1], [y0, y1], color="0.75", linewidth=1, zorder=1)


def _draw_nodes(axes: "Axes", graph: DraftGraph, places: list[Place]) -> None:
    shares = [1.0, *(count / max(graph.num_anchors, 1) for count in graph.counts or ())]
    if graph.counts is None:
        shares += [0.5] * len(graph)
    areas = [_SMALLEST + (_LARGEST - _SMALLEST) * share for share in shares]
    x, y = [place[0] for place in places], [place[1] for place in places]
    points = axes.scatter(
        x, y, s=areas, c=shares, cmap="viridis", vmin=0, vmax=1, edgecolors="0.2", linewidths=0.8, zorder=2
    )
    for node, (place, formula) in enumerate(zip(places, [(), *graph.formulas], strict=True)):
        text = f"{node}  {formula_text(formula)}" if node else "root"
        label = axes.annotate(text, place, (0, -14), textcoords="offset points", ha="center", va="top", fontsize=8)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3})
    if graph.counts is not None:
        bar = axes.figure.colorbar(points, ax=axes, shrink=0.6)
        bar.set_label("share of the states in which the node came true")
