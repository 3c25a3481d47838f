"""One draft graph out of several calibrations of the same model."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from vllm_dllm.draft.graph import DraftGraph, Formula
from vllm_dllm.draft.graph_file import GraphFile
from vllm_dllm.draft.provenance import decoding_settings
from vllm_dllm.errors import GraphError


def merge_graphs(named: Sequence[tuple[str, GraphFile]], num_nodes: int) -> GraphFile:
    """Add up counts and anchors, and keep the most frequent nodes that hang together.

    A node that one of the files lacks counts 0 there, although its calibration may have seen it. What was measured on
    held-out prompts does not carry over; date, seed, versions, readiness and token weights are those of the first file.

    Args:
        named: at least one graph with its name for messages.
        num_nodes: how many nodes to keep.

    Raises: GraphError for graphs without counts or provenance, for those of different models or settings, and for a
        calibration that is given twice.
    """
    conditions = [(name, _conditions(name, file)) for name, file in named]
    for name, found in conditions[1:]:
        _check_same(*conditions[0], name, found)
    _check_once(named)
    graphs = [file.graph for _, file in named]
    total: Counter[Formula] = Counter()
    expected: defaultdict[Formula, float] = defaultdict(float)
    for graph in graphs:
        total.update(dict(zip(graph.formulas, graph.counts or (), strict=True)))
        for formula, value in zip(graph.formulas, graph.expected or (), strict=False):
            expected[formula] += value
    kept = _most_frequent(total, graphs[0].tokens_per_step, num_nodes)
    merged = DraftGraph(
        formulas=kept,
        tokens_per_step=graphs[0].tokens_per_step,
        counts=tuple(total[formula] for formula in kept),
        num_anchors=sum(graph.num_anchors for graph in graphs),
        readiness=graphs[0].readiness,
        expected=tuple(expected[f] for f in kept) if all(graph.expected for graph in graphs) else None,
        tokens=graphs[0].tokens,
    )
    made = [file.provenance for _, file in named if file.provenance is not None]
    prompts = tuple(prompts for provenance in made for prompts in provenance.prompts)
    update = {"prompts": prompts, "acceptance_by_depth": (), "predicted_nfe": {}}
    return GraphFile(merged.parents_first(), made[0].model_copy(update=update))


def _conditions(name: str, file: GraphFile) -> dict[str, object]:
    """Return everything that decides a calibration's counts but its prompts and seed."""
    provenance = file.provenance
    if file.graph.counts is None or provenance is None:
        raise GraphError(f"{name} has no counts or no provenance; merge graphs that 'vllm-dllm calibrate' made")
    return {
        "model": provenance.model,
        "family": provenance.family,
        "shape": provenance.shape and str(provenance.shape),
        "temperature": provenance.temperature,
        "tokens_per_step": file.graph.tokens_per_step,
        **decoding_settings(provenance.settings),
    }


def _check_same(first_name: str, expected: dict[str, object], name: str, found: dict[str, object]) -> None:
    for key in expected | found:
        if expected.get(key) != found.get(key):
            raise GraphError(
                f"{name} was calibrated with {key} {found.get(key)!r}, but {first_name} with {expected.get(key)!r}; "
                "merge graphs of one model and the same settings"
            )


def _check_once(named: Sequence[tuple[str, GraphFile]]) -> None:
    """Check that nothing is counted twice: equal counts by one seed of the same prompts are the same decodings."""
    seen: list[tuple[str, GraphFile]] = []
    for name, file in named:
        for earlier, other in seen:
            if file.graph == other.graph and _origin(file) == _origin(other):
                what = "is given twice" if name == earlier else f"is the same calibration as {earlier}"
                raise GraphError(f"{name} {what}, so its counts would be added twice; give it once")
        seen.append((name, file))


def _origin(file: GraphFile) -> object:
    return file.provenance and (file.provenance.prompts, file.provenance.seed)


def _most_frequent(counts: Counter[Formula], tokens_per_step: int | None, num_nodes: int) -> tuple[Formula, ...]:
    """Return the most frequent nodes, each the child of an earlier one or of the root."""
    ranked = sorted(counts, key=lambda formula: (-counts[formula], len(formula), formula))
    whole = DraftGraph(tuple(ranked), tokens_per_step)
    kept, remaining = [0], list(range(1, len(ranked) + 1))
    while remaining and len(kept) <= num_nodes:
        node = next(node for node in remaining if not set(kept).isdisjoint(whole.parents[node - 1]))
        remaining.remove(node)
        kept.append(node)
    return tuple(ranked[node - 1] for node in kept[1:])
