"""Choose the nodes of a draft graph.

A state of a trace for which drafts could have been made is an *anchor*; its *path* is the formulas that its true future
states have, one for each step (`count.py`). Spiffy (arXiv:2509.18085v4, Algorithm 2) counts formulas and chooses a
connected subgraph of D nodes by what their counts add up to. `gain` is ours: it counts what a node adds to the nodes
chosen before it, so nodes that come true together are not paid twice, and a prefix of the choice is the choice for a
smaller D. docs/calibration.md compares them.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, TypeVar

from vllm_dllm.draft.graph import DraftGraph, Formula

Objective = Literal["gain", "degree-0", "degree-1", "full"]

FutureStates = tuple[Formula, ...]
"""The formula of each true future state of an anchor, until one that no formula describes."""

Node = TypeVar("Node", bound=Hashable)

POOL_SIZE = 600
"""The most frequent formulas, from which the sums of counts choose; all others are rarer than any chosen node."""


def count_formulas(paths: Iterable[FutureStates]) -> Counter[Formula]:
    """Count at how many anchors each formula was a true future state."""
    return Counter(formula for path in paths for formula in path)


def accept_length(path: Sequence[Node], chosen: set[Node]) -> int:
    """Count the leading nodes of a path that were chosen: the steps that drafts of all chosen nodes save."""
    return next((depth for depth, node in enumerate(path) if node not in chosen), len(path))


def select_by_gain(paths: Sequence[Sequence[Node]], num_nodes: int) -> list[Node]:
    """Take, one after another, the node that lengthens the accept paths of all anchors most.

    Greedy: the exact choice is a maximum coverage with connectivity, which no known method finds in reasonable time.
    Each node continues the accept path of an anchor, so one of its parents was chosen before. Equals go to the node
    that comes first in its order.

    Args:
        paths: of each anchor; nodes are formulas or anything else that tells states apart.
        num_nodes: at most so many are chosen, fewer if none is left that lengthens one.
    """
    chosen: list[Node] = []
    known: set[Node] = set()
    while len(chosen) < num_nodes:
        gains: Counter[Node] = Counter()
        for path in paths:
            length = accept_length(path, known)
            if length < len(path):
                gains[path[length]] += 1 + accept_length(path[length + 1 :], known)
        if not gains:
            break
        most = max(gains.values())
        best = min((node for node, gain in gains.items() if gain == most), key=repr)
        chosen.append(best)
        known.add(best)
    return chosen


def select_by_counts(
    counts: Counter[Formula], num_nodes: int, tokens_per_step: int | None, objective: Objective
) -> list[Formula]:
    """Choose a connected subgraph by a sum of counts, node by node (greedy).

    A node q is worth count(q) with `degree-0`; with `degree-1` also the counts of its parents among the chosen nodes,
    with `full` those of all its ancestors there.
    """
    ranked = sorted(counts, key=lambda formula: (-counts[formula], len(formula), formula))[:POOL_SIZE]
    if not ranked:
        return []
    chosen: list[Formula] = []

    def worth(formula: Formula) -> int:
        """Return a node's worth beside the chosen ones, -1 for one without a parent there."""
        ancestors = [other for other in chosen if set(other) < set(formula)]
        parents = DraftGraph((*ancestors, formula), tokens_per_step).parents[-1]
        if not parents:
            return -1
        paid = {"degree-0": [], "degree-1": [ancestors[p - 1] for p in parents if p], "full": ancestors}[objective]
        return counts[formula] + sum(counts[ancestor] for ancestor in paid)

    while len(chosen) < num_nodes:
        best = max((formula for formula in ranked if formula not in chosen), key=worth, default=None)
        if best is None or worth(best) < 0:
            break
        chosen.append(best)
    return chosen


def select(
    paths: Sequence[FutureStates], num_nodes: int, tokens_per_step: int | None, objective: Objective = "gain"
) -> list[Formula]:
    """Choose at most `num_nodes` formulas, best first; each has a parent among those before it, or the root."""
    if objective == "gain":
        return select_by_gain(paths, num_nodes)
    return select_by_counts(count_formulas(paths), num_nodes, tokens_per_step, objective)
