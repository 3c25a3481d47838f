"""What calibration knows of a node beyond what its readiness and probability say."""

import math

from vllm_dllm.draft.graph import DraftGraph


def log_corrections(graph: DraftGraph) -> list[float]:
    """Return for each node the logarithm of how often it came true over how often it was expected to."""
    if graph.counts is None or graph.expected is None:
        return [0.0] * len(graph)
    # Half an observation on both sides, so that a node nobody saw can still be ranked.
    return [math.log((n + 0.5) / (m + 0.5)) for n, m in zip(graph.counts, graph.expected, strict=True)]
