"""A draft graph as tensors; the only place that turns formulas into numbers on a device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dllm.draft.graph import DraftGraph, Formula
from vllm_dllm.draft.ranker import OrderRanker
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.draft.token_weights import TokenWeights


@dataclass(frozen=True, slots=True)
class Filling:
    """Nodes filled together, each from the canvas of a node that was filled before.

    `max_pairs` is the most pairs that one of them adds.
    """

    node: Tensor  # [num_filled] int64
    origin: Tensor  # [num_filled] int64, the node whose canvas each one extends
    draw: Tensor  # [num_filled] int64, index into CompiledGraph.num_unmasked
    position_rank: Tensor  # [num_filled, max_pairs] int64, among the positions that are masked in the origin
    vocab_rank: Tensor  # [num_filled, max_pairs] int64
    is_pair: Tensor  # [num_filled, max_pairs] bool


@dataclass(frozen=True, slots=True)
class PackedGraph:
    """The nodes as `ops.propose_nodes` takes them, ordered by positions unmasked in the first parent, then by parent.

    In this order parents precede, and what starts from canvases with as many masks lies together.
    """

    # [num_nodes, 5] int32: number; place of the first parent in this order, from 1 (0: the root); positions that it
    # adds to the root; depth; end of the node's pairs, which begin where those of the node before end.
    nodes: Tensor
    pairs: Tensor  # [num_pairs, 2] int32: position rank among what the first parent leaves masked, vocab rank
    log_correction: Tensor  # [num_nodes] float64


@dataclass(frozen=True, slots=True)
class CompiledGraph:
    """A graph of `num_nodes` nodes besides the root, node 0."""

    num_nodes: int
    num_vocab_ranks: int  # 1 + the largest vocab rank
    at_once: tuple[Filling, ...]  # every node straight from the root
    by_steps: tuple[Filling, ...]  # every node from its first parent, by depth
    num_unmasked: Tensor  # [num_draws] int64, pairs of the origins: what tells a step's noise from another's
    depth: Tensor  # [1 + num_nodes] int64
    first_parent: Tensor  # [num_nodes] int64, of nodes 1..num_nodes
    draw: Tensor  # [num_nodes] int64, index into num_unmasked of the step that leads from the first parent to a node
    is_on_way: Tensor  # [num_nodes, num_nodes] bool: the column's node is the row's, or on its chain of first parents
    readiness: Readiness
    is_one_by_one: bool  # every step unmasks one position
    log_correction: Tensor  # [num_nodes] float64
    packed: PackedGraph
    ranker: OrderRanker | None = None  # adds to the readiness
    tokens: TokenWeights | None = None  # order a position's tokens at temperature 0


def compile_graph(graph: DraftGraph, device: torch.device, ranker: OrderRanker | None = None) -> CompiledGraph:
    """Put a graph into tensors on a device, and the ranker that helps to order positions."""
    formulas: list[Formula] = [(), *graph.formulas]
    first_parent = [0, *(parents[0] for parents in graph.parents)]
    sizes = sorted({len(formulas[parent]) for parent in first_parent[1:]} | {0})
    depths = [0, *graph.depths]

    def filling(nodes: Sequence[int], origins: Sequence[int]) -> Filling:
        added = [_added(formulas[node], formulas[origin]) for node, origin in zip(nodes, origins, strict=True)]
        max_pairs = max(map(len, added))
        padded = [pairs + [(0, 0)] * (max_pairs - len(pairs)) for pairs in added]
        pairs = torch.tensor(padded, dtype=torch.int64, device=device)
        num_pairs = torch.tensor([len(pairs) for pairs in added], device=device)
        return Filling(
            node=torch.tensor(nodes, device=device),
            origin=torch.tensor(origins, device=device),
            draw=torch.tensor([sizes.index(len(formulas[origin])) for origin in origins], device=device),
            position_rank=pairs[..., 0],
            vocab_rank=pairs[..., 1],
            is_pair=torch.arange(max_pairs, device=device) < num_pairs[:, None],
        )

    # Chains of first parents; a node may be less deep than its chain is long.
    way: list[list[int]] = [[]]
    for node in range(1, len(formulas)):
        way.append([*way[first_parent[node]], node])
    by_steps = []
    for length in range(1, max(map(len, way)) + 1):
        nodes = [node for node in range(1, len(formulas)) if len(way[node]) == length]
        by_steps.append(filling(nodes, [first_parent[node] for node in nodes]))
    return CompiledGraph(
        num_nodes=len(graph),
        num_vocab_ranks=1 + graph.max_vocab_rank,
        at_once=(filling(range(1, len(formulas)), [0] * len(graph)),),
        by_steps=tuple(by_steps),
        num_unmasked=torch.tensor(sizes, device=device),
        depth=torch.tensor(depths, device=device),
        first_parent=torch.tensor(first_parent[1:], device=device),
        draw=torch.tensor([sizes.index(len(formulas[parent])) for parent in first_parent[1:]], device=device),
        is_on_way=torch.tensor(
            [[m + 1 in ancestors for m in range(len(graph))] for ancestors in way[1:]], device=device
        ),
        readiness=graph.readiness,
        is_one_by_one=graph.tokens_per_step == 1,
        log_correction=torch.tensor(graph.log_corrections, dtype=torch.float64, device=device),
        packed=_pack(graph, device),
        ranker=None if ranker is None else ranker.to(device),
        tokens=graph.tokens,
    )


def _pack(graph: DraftGraph, device: torch.device) -> PackedGraph:
    formulas: list[Formula] = [(), *graph.formulas]
    first_parent = [0, *(parents[0] for parents in graph.parents)]
    order = sorted(
        range(1, len(formulas)), key=lambda node: (len(formulas[first_parent[node]]), first_parent[node], node)
    )
    place = {0: 0, **{node: place for place, node in enumerate(order, 1)}}
    nodes, pairs = [], []
    for node in order:
        parent = first_parent[node]
        pairs += _added(formulas[node], formulas[parent])
        nodes.append((node, place[parent], len(formulas[parent]), graph.depths[node - 1], len(pairs)))
    return PackedGraph(
        nodes=torch.tensor(nodes, dtype=torch.int32, device=device),
        pairs=torch.tensor(pairs, dtype=torch.int32, device=device),
        log_correction=torch.tensor(
            [graph.log_corrections[node - 1] for node in order], dtype=torch.float64, device=device
        ),
    )


def _added(formula: Formula, origin: Formula) -> list[tuple[int, int]]:
    """Return the pairs that a formula adds to another, position ranks counted among what the other leaves masked."""
    taken = [rank for rank, _ in origin]
    return [(rank - sum(t < rank for t in taken), vocab) for rank, vocab in formula if (rank, vocab) not in origin]
