"""The draft graph as a value: which future states of a block a step evaluates beside the present one.

Spiffy (arXiv:2509.18085v4) sec. 4.1-4.2. A node stands for the root's canvas with some more positions unmasked. Which
ones, and with which tokens, its *formula* says in ranks: a set of (position rank, vocab rank) pairs, both from 0. The
position rank orders the positions that are masked in the root by readiness (in the paper: by confidence), the vocab
rank orders the tokens of such a position by probability, or by token weights (ours); both in the distribution that made
the root. So one graph serves every state of every text.

A node's parents are the nodes whose formula is a subset of its own: with `tokens_per_step` those that have exactly so
many pairs fewer, else the largest subsets. The root, node 0, has the empty formula.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vllm_dllm.draft.readiness import BY_CONFIDENCE, Readiness
from vllm_dllm.draft.token_weights import TokenWeights

Pair = tuple[int, int]
"""(position rank, vocab rank)"""

Formula = tuple[Pair, ...]
"""Pairs in ascending order, at most one per position rank."""

MAX_NODES = 64

MAX_CANDIDATES = 8
"""Tokens of a position that a draft may choose from: vocab ranks are below."""


def formula_text(formula: Formula) -> str:
    """Write a formula for a reader: `{0-2, 4, 5:1}` is ranks 0 to 2 and 4 with the first token, 5 with the second."""
    runs: list[list[Pair]] = []
    for rank, vocab_rank in formula:
        last = runs[-1][-1] if runs else None
        if vocab_rank == 0 and last == (rank - 1, 0):
            runs[-1].append((rank, 0))
        else:
            runs.append([(rank, vocab_rank)])
    return f"{{{', '.join(map(_run_text, runs))}}}"


def _run_text(run: list[Pair]) -> str:
    (first, vocab_rank), last = run[0], run[-1][0]
    if vocab_rank:
        return f"{first}:{vocab_rank}"
    return f"{first}" if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class DraftGraph:
    """Nodes 1..len(formulas); node 0 is the root.

    Attributes:
        formulas: of the nodes, best first; of each node's parents at least one precedes it.
        tokens_per_step: positions that each step of the policy unmasks, None when that varies.
        counts: how often each node was a true future state in calibration; None when nobody counted.
        num_anchors: states for which a draft could have been made in calibration.
        readiness: what orders the positions.
        expected: how often each node should have been a true future state by its readiness and probability alone;
            counts that differ correct the forecast. None when nobody counted.
        tokens: what orders the tokens of a position in place of their probability; None: nothing does.
    """

    formulas: tuple[Formula, ...]
    tokens_per_step: int | None = None
    counts: tuple[int, ...] | None = None
    num_anchors: int = 0
    readiness: Readiness = BY_CONFIDENCE
    expected: tuple[float, ...] | None = None
    tokens: TokenWeights | None = None

    @classmethod
    def chain(cls, num_nodes: int) -> "DraftGraph":
        """Return the graph whose node of depth d adds the best d positions, with the most probable tokens."""
        return cls(tuple(tuple((rank, 0) for rank in range(depth)) for depth in range(1, num_nodes + 1)))

    def __len__(self) -> int:
        """Return the number of nodes, the root not counted."""
        return len(self.formulas)

    @cached_property
    def parents(self) -> tuple[tuple[int, ...], ...]:
        """Parents of each node of `formulas`, as node numbers (0: the root), ascending."""
        sets = [frozenset[Pair](), *map(frozenset, self.formulas)]
        return tuple(self._parents_of(sets, node) for node in range(1, len(sets)))

    def _parents_of(self, sets: list[frozenset[Pair]], node: int) -> tuple[int, ...]:
        subsets = [m for m in range(len(sets)) if sets[m] < sets[node]]
        if self.tokens_per_step is not None:
            return tuple(m for m in subsets if len(sets[node]) - len(sets[m]) == self.tokens_per_step)
        return tuple(m for m in subsets if not any(sets[m] < sets[other] for other in subsets))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Steps from the root to each node of `formulas`, along the shortest way."""
        depths = {0: 0}
        for node in sorted(range(1, 1 + len(self)), key=lambda node: len(self.formulas[node - 1])):
            depths[node] = 1 + min(depths[parent] for parent in self.parents[node - 1])
        return tuple(depths[node] for node in range(1, 1 + len(self)))

    @cached_property
    def max_vocab_rank(self) -> int:
        """The largest vocab rank of any pair; 0 for a graph without nodes."""
        return max((rank for formula in self.formulas for _, rank in formula), default=0)

    @cached_property
    def log_corrections(self) -> tuple[float, ...]:
        """For each node the logarithm of how often it came true over how often it was expected to."""
        if self.counts is None or self.expected is None:
            return (0.0,) * len(self)
        # Half an observation on both sides, so that a node nobody saw can still be ranked.
        return tuple(math.log((n + 0.5) / (m + 0.5)) for n, m in zip(self.counts, self.expected, strict=True))

    def only(self, nodes: Sequence[int]) -> "DraftGraph":
        """Return the graph of the given nodes, from 1 on, in the given order."""
        return replace(
            self,
            formulas=tuple(self.formulas[node - 1] for node in nodes),
            counts=None if self.counts is None else tuple(self.counts[node - 1] for node in nodes),
            expected=None if self.expected is None else tuple(self.expected[node - 1] for node in nodes),
        )

    def parents_first(self) -> "DraftGraph":
        """Return the graph with every child that precedes a parent moved right behind its last one.

        There is always such an order: a parent is a strict subset of its children, so no node precedes itself.
        """
        remaining, order = list(range(1, len(self) + 1)), [0]
        while remaining:
            node = next(node for node in remaining if set(self.parents[node - 1]) <= set(order))
            remaining.remove(node)
            order.append(node)
        return self.only(order[1:])
