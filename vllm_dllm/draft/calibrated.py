"""Drafts by a calibrated draft graph, and the look-ahead: the `Drafter` that serves."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch

from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.look_ahead import NUM_NODES
from vllm_dllm.draft.native import Propose, choose_propose
from vllm_dllm.draft.ranker import OrderRanker
from vllm_dllm.draft.ranker_shape import Weights
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.unmask.walk import Nodes

DEPTH_CHANCE = 0.6
"""Without counts: the chance that one more step of the chain is foreseen..."""
SIBLING_CHANCE = 0.3
"""... and what each further draft of the same depth has of the one before it."""
LOOK_AHEAD_CHANCE = 0.2
"""The chance that a step's look-ahead comes true: 0.1 to 0.45 in simulations of blocks of 4 and 8."""


class GraphDrafter:
    """Fills the nodes of a draft graph from the candidates of each slot's last decided step.

    Drafts are made when a step has room for them, so that a step without costs nothing more than a copy.

    Args:
        graph: of the model.
        look_ahead_from: as in `Drafter`.
        choose: how drafts are made on a device.
        ranker: weights of an order ranker (`draft.ranker_file`), which adds to the graph's readiness; None: none does.
    """

    def __init__(
        self,
        graph: DraftGraph,
        look_ahead_from: int | None = None,
        choose: Callable[[torch.device], Propose] = choose_propose,
        ranker: Weights | None = None,
    ) -> None:
        self.look_ahead_from = look_ahead_from
        self._ranker = ranker
        self.memory: DraftState | None = None
        self._graph, self._choose = graph, choose

    def prior(self) -> list[float]:
        """Return how many transitions the best nodes of each budget 0..len(graph) are expected to save per step.

        A node saves one when it is a true future state: the share of the anchors for which it was one in calibration,
        and where nobody counted `DEPTH_CHANCE ** depth`, with `SIBLING_CHANCE` for each better node of its depth. From
        `look_ahead_from` on a look-ahead takes the place of the last `NUM_NODES`.
        """
        graph = self._graph
        if graph.counts is not None and graph.num_anchors > 0:
            shares = [count / graph.num_anchors for count in graph.counts]
        else:
            better: defaultdict[int, int] = defaultdict(int)
            shares = []
            for depth in graph.depths:
                shares.append(DEPTH_CHANCE**depth * SIBLING_CHANCE ** better[depth])
                better[depth] += 1
        shares.sort(reverse=True)  # a step evaluates the likeliest nodes, wherever they stand in the graph

        def expected(budget: int) -> float:
            if self.look_ahead_from is not None and budget >= self.look_ahead_from:
                return math.fsum(shares[: budget - NUM_NODES]) + LOOK_AHEAD_CHANCE
            return math.fsum(shares[:budget])

        # Something of an expectation is left to every draft, since it is divided by when it is corrected.
        return [0.0, *(max(expected(budget), 0.01) for budget in range(1, len(graph) + 1))]

    def attach(self, canvases: CanvasState) -> None:
        """Compile the graph and make room for the candidates of every slot."""
        self._canvases = canvases
        ranker = None if self._ranker is None else OrderRanker.of(self._ranker)
        self._compiled = compile_graph(self._graph, canvases.device, ranker)
        self._propose = self._choose(canvases.device)
        self.memory = DraftState(canvases)

    def propose(self, blocks: Blocks, num_drafts: int, *, looks_ahead: bool) -> Nodes:
        """Return the canvases and their best drafts; none is valid where the block has no step behind it."""
        assert self.memory is not None, "attach comes before"
        return self._propose(self._compiled, self._canvases, self.memory, blocks, num_drafts, looks_ahead)
