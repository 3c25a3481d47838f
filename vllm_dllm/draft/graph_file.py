"""Draft graphs as JSON: what a file holds, what is refused, and whether a graph fits a server.

`graph_schema` checks fields, types and ranges; here is what ties them together. Text is the one input of both: an
object of the settings is written as JSON first, so that a graph inline is checked exactly as the same graph in a file.
"""

import dataclasses
import functools
import json
import math
import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph, formula_text
from vllm_dllm.draft.graph_schema import (
    MAX_POSITION_RANK,
    REMEDY,
    SCHEMA_VERSION,
    GraphSchema,
    ModelShape,
    Provenance,
    read_schema,
)
from vllm_dllm.draft.provenance import fit_warnings
from vllm_dllm.draft.readiness import BY_CONFIDENCE, Readiness
from vllm_dllm.draft.token_weights import TokenWeights
from vllm_dllm.errors import GraphError, did_you_mean_file
from vllm_dllm.unmask.registry import NATIVE

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20

_LIKE: dict[str, str] = {
    "margin": "static",
    "entropy": "static",
    "sequential": "static",
    "origin": "threshold",
    "dynamic": "threshold",
    "entropy_bounded": "threshold",
    "credit": "threshold",
}
"""Policies that may lack a graph of their own, and the one whose steps are most like theirs; of those in torch code it
is `threshold`."""


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A draft graph, and where it comes from; a graph that nobody calibrated has no provenance."""

    graph: DraftGraph
    provenance: Provenance | None = None


def load_graph(path: str | Path, words: Sequence[str] = ()) -> GraphFile:
    """Read a graph file.

    Args:
        path: of the file.
        words: what the user might have given instead, of which the path may be a typo.

    Raises: GraphError naming the file, the path inside it, what was given, what is allowed and what to do.
    """
    where = str(path) or "''"
    todo = "give the path of a graph file, as 'vllm-dllm calibrate' writes it"
    try:
        if str(path) and Path(path).is_dir():
            raise GraphError(f"{where} is a folder; {todo}")
        if not Path(path).is_file():
            raise GraphError(f"{where} is not a file; {did_you_mean_file(path, todo, words)}")
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise GraphError(f"{where} cannot be read ({error.strerror}); check its path and its permissions") from None
    if len(content) > MAX_FILE_BYTES:
        raise GraphError(f"{where} is larger than {MAX_FILE_BYTES} bytes, so it is no graph file; give another path")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise GraphError(f"{where} is not UTF-8 text (byte {error.start}); {REMEDY}") from None
    return _parse_text(text, where)


def parse_graph(value: object, where: str = "draft_graph") -> GraphFile:
    """Read a graph that is given as an object, for example in a server's settings.

    Args:
        value: what `json.load` makes of a graph file.
        where: what the user calls it.

    Raises: GraphError, see `load_graph`.
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise GraphError(f"{where} cannot be written as JSON ({error}); give a graph file's content") from None
    return _parse_text(text, where)


def default_graph(policy: str, block_length: int = MAX_POSITION_RANK + 1, family: str = "llada") -> GraphFile:
    """Return the graph for models without one of their own, less the nodes that name positions a block has not.

    Of those that are shipped it is one of the policy, else of one whose steps are alike; of these one of the family,
    and of these the one with the most similar block length.

    Args:
        policy: of the server.
        block_length: of the server.
        family: `model_type` of the server's model.
    """

    def distance(made: Provenance) -> tuple[bool, bool, bool, float]:
        settings = made.settings
        is_alike = settings.policy in {policy, _LIKE.get(policy, policy if policy in NATIVE else "threshold")}
        ratio = abs(math.log(settings.block_length / block_length))
        return not is_alike, settings.policy != policy, made.family != family, ratio

    _, file = min(((distance(made), file) for made, file in _shipped_graphs()), key=lambda found: found[0])
    graph = file.graph
    # A parent's position ranks are among its child's, so what stays hangs on the root as before.
    fitting = [node for node, formula in enumerate(graph.formulas, start=1) if formula[-1][0] < block_length]
    return GraphFile(graph.only(fitting), file.provenance)


@functools.lru_cache(maxsize=1)
def _shipped_graphs() -> tuple[tuple[Provenance, GraphFile], ...]:
    """Read the graphs of this package, in the order of their names."""
    folder = resources.files("vllm_dllm.draft").joinpath("graphs")
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".json")), key=lambda path: path.name)
    files = [_parse_text(path.read_text("utf-8"), path.name) for path in paths]
    return tuple((file.provenance, file) for file in files if file.provenance is not None)


def dump_graph(file: GraphFile) -> str:
    """Write a graph as JSON; equal graphs give equal texts, and reading returns the graph.

    Raises: GraphError for a graph that could not be read again.
    """
    graph = file.graph
    head: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "tokens_per_step": graph.tokens_per_step,
        "num_anchors": graph.num_anchors,
        "readiness": dataclasses.asdict(graph.readiness),
        **({} if graph.tokens is None else {"tokens": dataclasses.asdict(graph.tokens)}),
        "nodes": [],
    }
    if file.provenance is not None:
        without = {"shape"} if file.provenance.shape is None else None
        head["provenance"] = file.provenance.model_dump(mode="json", exclude=without)
    nodes: list[dict[str, object]] = [{"formula": formula} for formula in graph.formulas]
    for node, count in zip(nodes, graph.counts or (), strict=graph.counts is not None):
        node["count"] = count
    for node, expected in zip(nodes, graph.expected or (), strict=graph.expected is not None):
        node["expected"] = expected
    lines = ",\n".join(f"    {json.dumps(node)}" for node in nodes)
    # A node is a line. Quotes within strings are escaped, so this is the field.
    text = json.dumps(head, indent=2, ensure_ascii=False).replace('"nodes": []', f'"nodes": [\n{lines}\n  ]', 1) + "\n"
    _parse_text(text, "this graph")
    return text


def save_graph(file: GraphFile, path: str | Path) -> None:
    """Write a graph file.

    Raises: GraphError for a graph that could not be read again, and for a path that cannot be written.
    """
    text = dump_graph(file)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise GraphError(f"{path} cannot be written ({error}); give another path") from None


def _parse_text(text: str, where: str) -> GraphFile:
    try:
        content = json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise GraphError(f"{where} is not JSON of a graph ({error}); {REMEDY}") from None
    if isinstance(content, dict) and not {"method", "draft_graph"}.isdisjoint(content):
        raise GraphError(
            f"{where} is a speculative_config, and no graph: its draft_graph is "
            f"{reprlib.repr(content.get('draft_graph', 'default'))}; give the file of a graph"
        )
    schema = read_schema(text, where)
    graph = DraftGraph(
        formulas=tuple(tuple(sorted(node.formula)) for node in schema.nodes),
        tokens_per_step=schema.tokens_per_step,
        counts=_counts(schema, where),
        num_anchors=schema.num_anchors,
        readiness=BY_CONFIDENCE if schema.readiness is None else Readiness(**schema.readiness.model_dump()),
        expected=_all_or_none([node.expected for node in schema.nodes], "expected", where),
        tokens=None if schema.tokens is None else TokenWeights(**schema.tokens.model_dump()),
    )
    _check_formulas(graph, where)
    if schema.provenance is not None:
        _check_ranks(graph, schema.provenance.settings.block_length, f"{where}: provenance.settings.block_length")
    return GraphFile(graph.parents_first(), schema.provenance)


def refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of its pairs, as `object_pairs_hook` of `json.loads`; raises ValueError for a repeated key."""
    [(key, times)] = Counter(key for key, _ in pairs).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"the key {reprlib.repr(key)} is given {times} times in one object")
    return dict(pairs)


def _counts(schema: GraphSchema, where: str) -> tuple[int, ...] | None:
    """Check and return the counts of the nodes, None when no node has one."""
    counts = _all_or_none([node.count for node in schema.nodes], "count", where)
    for index, count in enumerate(counts or ()):
        if count > schema.num_anchors:
            raise GraphError(
                f"{where}: nodes[{index}].count is {count}, but num_anchors is {schema.num_anchors}, and a node comes "
                f"true at most once for each; allowed are 0..{schema.num_anchors}; {REMEDY}"
            )
    return counts


def _all_or_none(values: Sequence[T | None], field: str, where: str) -> tuple[T, ...] | None:
    """Return a field of all nodes, None when no node has it."""
    given = tuple(value for value in values if value is not None)
    if given and len(given) < len(values):
        path = f"{where}: nodes[{list(values).index(None)}].{field}"
        raise GraphError(f"{path} is missing, but other nodes have one; give all of them or none")
    return given or None


def _check_formulas(graph: DraftGraph, where: str) -> None:
    """Check that formulas are sets, that none comes twice, and that each hangs on the root.

    A node's parents have fewer pairs than it has. So it is enough that each has one, and there are no cycles.
    """
    for index, formula in enumerate(graph.formulas):
        path, shown = f"{where}: nodes[{index}].formula", reprlib.repr([list(pair) for pair in formula])
        if len({rank for rank, _ in formula}) < len(formula):
            raise GraphError(f"{path} is {shown}; allowed are formulas with each position rank once; {REMEDY}")
        if (first := graph.formulas.index(formula)) < index:
            raise GraphError(f"{path} is {shown}, as is nodes[{first}].formula; remove one of these nodes")
        if graph.tokens_per_step is not None and len(formula) % graph.tokens_per_step:
            raise GraphError(
                f"{path} has {len(formula)} pairs, but tokens_per_step is {graph.tokens_per_step}; allowed are "
                f"multiples of {graph.tokens_per_step}; {REMEDY}"
            )
    for index, parents in enumerate(graph.parents):
        if not parents:
            shown = formula_text(graph.formulas[index])
            raise GraphError(
                f"{where}: nodes[{index}].formula, {shown}, has no parent; allowed with tokens_per_step "
                f"{graph.tokens_per_step} are formulas that extend the root or another node by as many pairs; add that "
                "node or remove this one"
            )


def _check_ranks(graph: DraftGraph, block_length: int, where: str) -> None:
    """Check that a block has the positions that the formulas name."""
    for index, formula in enumerate(graph.formulas):
        if formula[-1][0] >= block_length:
            raise GraphError(
                f"{where} is {block_length}, but nodes[{index}].formula has position rank {formula[-1][0]}; allowed "
                f"are 0..{block_length - 1}; remove the node or choose a graph for this block_length"
            )


def check_fit(
    file: GraphFile,
    settings: DllmConfig,
    *,
    where: str,
    model: str | None = None,
    family: str | None = None,
    shape: ModelShape | None = None,
) -> list[str]:
    """Check that a graph can serve, and tell in what its calibration differed from a server.

    A difference costs speed only: fewer drafts may come true. A graph without provenance differs in nothing. Models
    are compared by family and shape; by name, the last component of it, where both are names on the hub, or where the
    graph's file or the server has no shape.

    Args:
        file: the graph.
        settings: of the server.
        where: what the user calls the graph.
        model: name or path of the server's model; None is not compared.
        family: of the server's model; None is not compared.
        shape: of the server's model.

    Returns: a sentence for each difference, with the command that calibrates for this server.

    Raises: GraphError when a block of the server has fewer positions than the graph's formulas name.
    """
    _check_ranks(file.graph, settings.block_length, f"{where}: block_length of this server")
    if file.provenance is None:
        return []
    return fit_warnings(file.provenance, settings, where=where, model=model, family=family, shape=shape)
