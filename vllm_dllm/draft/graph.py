"""The draft graph as a value: which future states of a block a step evaluates beside the present one.

Spiffy (arXiv:2509.18085v4) sec. 4.1-4.2. A node stands for the root's canvas with some more positions unmasked. Which
ones, and with which tokens, its *formula* says in ranks: a set of (position rank, vocab rank) pairs, both from 0. The
position rank orders the positions that are masked in the root by confidence, the vocab rank orders the tokens of such
a position by probability; both in the distribution that made the root. So one graph serves every state of every text.

A node's parents are the nodes whose formula is a subset of its own: with `tokens_per_step` those that have exactly so
many pairs fewer, else the largest subsets. The root, node 0, has the empty formula.
"""

from dataclasses import dataclass
from functools import cached_property

Pair = tuple[int, int]
"""(position rank, vocab rank)"""

Formula = tuple[Pair, ...]
"""Pairs in ascending order, at most one per position rank."""

MAX_NODES = 64


@dataclass(frozen=True)
class DraftGraph:
    """Nodes 1..len(formulas); node 0 is the root.

    Attributes:
        formulas: of the nodes, best first; a parent precedes its children.
        tokens_per_step: positions that each step of the policy unmasks, None when that varies.
        counts: how often each node was a true future state in calibration; None when nobody counted.
        num_anchors: states for which a draft could have been made in calibration.
    """

    formulas: tuple[Formula, ...]
    tokens_per_step: int | None = None
    counts: tuple[int, ...] | None = None
    num_anchors: int = 0

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
        depths = [0]
        for parents in self.parents:
            depths.append(1 + min(depths[parent] for parent in parents))
        return tuple(depths[1:])

    @cached_property
    def max_vocab_rank(self) -> int:
        """The largest vocab rank of any pair; 0 for a graph without nodes."""
        return max((rank for formula in self.formulas for _, rank in formula), default=0)

    def first(self, num_nodes: int) -> "DraftGraph":
        """Return the graph of the best `num_nodes` nodes."""
        counts = None if self.counts is None else self.counts[:num_nodes]
        return DraftGraph(self.formulas[:num_nodes], self.tokens_per_step, counts, self.num_anchors)
