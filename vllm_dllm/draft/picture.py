"""A picture of a draft graph: a row of boxes per depth, an edge to every parent."""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dllm.draft.graph import DraftGraph, formula_text
from vllm_dllm.draft.graph_file import GraphFile
from vllm_dllm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")

# Inches. Ten boxes side by side are as wide as the text of a README.
_COLUMN, _ROW, _MARGIN, _HEAD = 0.82, 0.66, 0.12, 0.85
_BOX = (0.76, 0.36)
_LEAST_COLUMNS = 8  # room for the heading

Place = tuple[float, float]
"""Where the middle of a node is, in inches from the top left corner."""


def title_of(file: GraphFile) -> str:
    """Write what a graph is for, as a heading."""
    text = f"Draft graph with {len(file.graph)} node{'s' * (len(file.graph) > 1)}"
    if file.provenance is None:
        return text
    settings = file.provenance.settings
    return f"{text} for {file.provenance.model}, policy {settings.policy}, blocks of {settings.block_length}"


def draw_graph(graph: DraftGraph, path: Path, title: str) -> None:
    """Write a picture; the darker a node, the more often it was a true future state in calibration.

    Equal graphs give equal files with one version of matplotlib.

    Args:
        graph: at least one node.
        path: its suffix, `.svg` or `.png`, chooses the format.
        title: written above the graph; see `title_of`.

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
    width = 2 * _MARGIN + max(x for x, _ in places) + min(x for x, _ in places)
    figure = Figure(figsize=(width, max(y for _, y in places) + _BOX[1] / 2 + _MARGIN))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, figure.get_figwidth()), ylim=(figure.get_figheight(), 0))
    axes.set_axis_off()
    axes.text(_MARGIN, 0.22, title, fontsize=11, fontweight="bold", va="center", parse_math=False)
    axes.text(_MARGIN, 0.48, _legend(graph), fontsize=8, va="center", color="0.3")
    _draw_edges(axes, graph, places)
    _draw_nodes(axes, graph, places)
    is_svg = path.suffix.lower() == ".svg"
    try:
        with mpl.rc_context({"svg.hashsalt": "draft graph", "svg.fonttype": "none"}):
            # A date would make equal pictures differ.
            figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
    except OSError as error:
        raise ConfigError(f"picture {str(path)!r} cannot be written ({error.strerror}); give another path") from None


def _legend(graph: DraftGraph) -> str:
    text = "{0-2, 4}: ranks of the positions to unmask; 3:1 takes the second likeliest token."
    return text + ("" if graph.counts is None else " Percent: of the states in calibration")


def _places(graph: DraftGraph) -> list[Place]:
    """Place the root and the nodes: a row per depth, in it by the mean place of the parents, then the best first."""
    depths = (0, *graph.depths)
    most = max(_LEAST_COLUMNS, *(depths.count(depth) for depth in depths))
    middle = _MARGIN + most * _COLUMN / 2
    places: list[Place] = [(middle, _HEAD)] * len(depths)
    for depth in range(1, 1 + max(depths)):
        row = [node for node, its_depth in enumerate(depths) if its_depth == depth]
        row.sort(key=lambda node: (_mean_x(places, graph.parents[node - 1]), node))
        for index, node in enumerate(row):
            places[node] = (middle + (index - (len(row) - 1) / 2) * _COLUMN, _HEAD + depth * _ROW)
    return places


def _mean_x(places: list[Place], parents: tuple[int, ...]) -> float:
    return sum(places[parent][0] for parent in parents) / len(parents)


def _draw_edges(axes: "Axes", graph: DraftGraph, places: list[Place]) -> None:
    """From the lower edge of the parent to the upper edge of the node, so that they cross no box of either row."""
    for node, parents in enumerate(graph.parents, start=1):
        for parent in parents:
            (x0, y0), (x1, y1) = places[parent], places[node]
            axes.plot([x0, x1], [y0 + _BOX[1] / 2, y1 - _BOX[1] / 2], color="0.6", linewidth=0.9, zorder=1)


def _draw_nodes(axes: "Axes", graph: DraftGraph, places: list[Place]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import FancyBboxPatch

    shares = [count / max(graph.num_anchors, 1) for count in graph.counts or ()]
    for node, (x, y) in enumerate(places):
        share = shares[node - 1] if node and shares else 0.0
        corner = (x - _BOX[0] / 2, y - _BOX[1] / 2)
        style, color = "round,pad=0,rounding_size=0.06", colormaps["Blues"](0.04 + 0.6 * share)
        axes.add_patch(
            FancyBboxPatch(corner, *_BOX, boxstyle=style, facecolor=color, edgecolor="0.4", linewidth=0.8, zorder=2)
        )
        lines = [formula_text(graph.formulas[node - 1]), str(node)] if node else ["root", "present state"]
        if node and shares:
            lines[1] += f":  {share:.1%}"
        for line, shift, size in zip(lines, (-0.07, 0.09), (8.0, 6.5), strict=True):
            axes.text(x, y + shift, line, ha="center", va="center", fontsize=size, zorder=3, parse_math=False)
