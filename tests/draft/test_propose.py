"""What the nodes of a graph are filled with, on distributions made by hand."""

import math

import pytest
import torch

from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import DraftGraph, Formula
from vllm_dllm.draft.propose import DraftNoise, Drafts, Roots, propose
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.unmask.stats import Candidates

MASK = 3
CPU = torch.device("cpu")


def candidates(rows: list[list[tuple[int, float]]]) -> Candidates:
    """One request; for each position its (token, probability), most probable first."""
    token_ids = torch.tensor([[[token for token, _ in row] for row in rows]])
    probs = torch.tensor([[[p for _, p in row] for row in rows]], dtype=torch.float64)
    return Candidates(token_ids, probs.log())


ROWS = candidates([[(10, 0.5), (11, 0.4)], [(20, 0.9), (21, 0.1)], [(30, 0.7), (31, 0.2)], [(40, 0.8), (41, 0.1)]])


def roots(canvas: torch.Tensor, rows: Candidates) -> Roots:
    return Roots(canvas, canvas == MASK, torch.zeros_like(canvas, dtype=torch.bool), rows)


def drafts_of(formulas: list[Formula], canvas: list[int], rows: Candidates = ROWS) -> Drafts:
    return propose(compile_graph(DraftGraph(tuple(formulas), 1), CPU), roots(torch.tensor([canvas]), rows), None)


def canvases(drafts: Drafts) -> set[tuple[int, ...]]:
    return {tuple(canvas) for canvas in drafts.canvas[0].tolist()}


def test_ranks_order_masked_positions_and_tokens() -> None:
    drafts = drafts_of([((0, 0),), ((1, 0),), ((0, 0), (1, 0)), ((2, 1),)], [MASK] * 4)
    assert canvases(drafts) == {
        (MASK, 20, MASK, MASK),
        (MASK, MASK, MASK, 40),
        (MASK, 20, MASK, 40),
        (MASK, MASK, 31, MASK),
    }
    num_unmasked = (drafts.canvas != MASK).sum(-1)
    assert drafts.depth.tolist() == num_unmasked.tolist()
    assert drafts.is_valid.all()


def test_known_positions_have_no_rank() -> None:
    drafts = drafts_of([((0, 0),), ((1, 1),)], [MASK, 99, MASK, MASK])
    assert canvases(drafts) == {(MASK, 99, MASK, 40), (MASK, 99, 31, MASK)}


def test_equal_confidences_go_to_the_lowest_position() -> None:
    rows = candidates([[(10, 0.5)], [(20, 0.5)], [(30, 0.5)], [(40, 0.5)]])
    assert drafts_of([((0, 0),), ((2, 0),)], [MASK] * 4, rows).canvas[0].tolist() == [
        [10, MASK, MASK, MASK],
        [MASK, MASK, 30, MASK],
    ]


def test_nodes_beyond_the_masks_or_without_any_left_are_invalid_and_last() -> None:
    drafts = drafts_of([((2, 0),), ((0, 0),), ((0, 0), (1, 0))], [MASK, 99, MASK, 99])
    assert drafts.is_valid.tolist() == [[True, False, False]]
    assert drafts.canvas[0, 0].tolist() == [MASK, 99, 30, 99]


def test_counts_beyond_expectation_order_nodes_of_equal_tokens() -> None:
    graph = DraftGraph((((0, 0),), ((1, 0),)), 1, counts=(30, 40), num_anchors=100, expected=(60.0, 40.0))
    rows = candidates([[(10, 0.5)], [(20, 0.5)], [(30, 0.5)], [(40, 0.5)]])
    drafts = propose(compile_graph(graph, CPU), roots(torch.full((1, 4), MASK), rows), None)
    assert drafts.canvas[0].tolist() == [[MASK, 20, MASK, MASK], [10, MASK, MASK, MASK]]


def test_neighbours_of_new_positions_are_readier() -> None:
    """Position 1 was just unmasked; at distance 1 and 2 that weighs more than a little confidence."""
    rows = candidates([[(10, 0.5)], [(20, 0.9)], [(30, 0.4)], [(40, 0.45)], [(50, 0.55)]])
    canvas = torch.tensor([[MASK, 20, MASK, MASK, MASK]])
    start = Roots(canvas, canvas == MASK, torch.tensor([[False, True, False, False, False]]), rows)
    graph = DraftGraph((((0, 0),), ((1, 0),), ((2, 0),), ((3, 0),)), 1, readiness=Readiness(1.0, (2.0, 1.0)))
    drafts = propose(compile_graph(graph, CPU), start, None)
    unmasked = [int((row != canvas[0]).nonzero()) for row in drafts.canvas[0]]
    assert unmasked == [0, 2, 3, 4]


@pytest.mark.parametrize("tokens_per_step", [1, None])
def test_nodes_are_ordered_by_the_chance_of_being_reached(tokens_per_step: int | None) -> None:
    """Two positions: the order of unmasking and the tokens are independent choices."""
    rows = candidates([[(10, 0.6), (11, 0.3)], [(20, 0.8), (21, 0.2)], [(30, 0.001), (31, 0.001)]])
    formulas = (((0, 0),), ((1, 0),), ((0, 1),), ((0, 0), (1, 0)))
    graph = DraftGraph(formulas, tokens_per_step)
    drafts = propose(compile_graph(graph, CPU), roots(torch.full((1, 3), MASK), rows), None)
    odds = {0: 0.6 / 0.4, 1: 0.8 / 0.2, 2: 0.001 / 0.999}
    if tokens_per_step == 1:
        z, rest = sum(odds.values()), odds[0] + odds[2]
    else:
        z, rest = (math.prod(1 + odds[i] for i in which) - 1 for which in ((0, 1, 2), (0, 2)))
    chance = {
        (MASK, 20, MASK): odds[1] / z * 0.8,
        (10, MASK, MASK): odds[0] / z * 0.6,
        (MASK, 21, MASK): odds[1] / z * 0.2,
        (10, 20, MASK): odds[1] / z * 0.8 * odds[0] / rest * 0.6,
    }
    assert [tuple(row) for row in drafts.canvas[0].tolist()] == sorted(chance, key=lambda c: -chance[c])


@pytest.mark.parametrize("num_nodes", [1, 4])
def test_requests_do_not_see_each_other(num_nodes: int) -> None:
    formulas: list[Formula] = [((0, 0),), ((0, 0), (1, 0)), ((1, 0),), ((0, 1),)][:num_nodes]
    generator = torch.Generator().manual_seed(0)
    canvas = torch.where(torch.rand(5, 6, generator=generator) < 0.7, MASK, 50)
    log_probs = torch.rand(5, 6, 4, generator=generator, dtype=torch.float64).log().sort(-1, descending=True).values
    rows = Candidates(torch.randint(60, 99, (5, 6, 4), generator=generator), log_probs)
    together_from = Roots(canvas, canvas == MASK, torch.rand(5, 6, generator=generator) < 0.3, rows)
    noise = DraftNoise(
        seed=torch.arange(5),
        position=torch.arange(6).expand(5, 6),
        temperature=torch.tensor([0.0, 0.5, 1.0, 1.0, 0.0], dtype=torch.float64),
        top_k=torch.tensor([0, 2, 0, 3, 0]),
        top_p=torch.tensor([1.0, 1.0, 0.6, 1.0, 1.0], dtype=torch.float64),
        is_random=torch.tensor([False, False, True, False, True]),
    )
    graph = compile_graph(DraftGraph(tuple(formulas), readiness=Readiness(1.5, (1.0, 0.5), -1.0)), CPU)
    together = propose(graph, together_from, noise)
    for i in range(5):
        one = slice(i, i + 1)
        own = DraftNoise(*(getattr(noise, name)[one] for name in DraftNoise.__dataclass_fields__))
        mine = Candidates(rows.token_ids[one], rows.log_probs[one])
        alone_from = Roots(canvas[one], canvas[one] == MASK, together_from.is_new[one], mine)
        alone = propose(graph, alone_from, own)
        assert torch.equal(alone.canvas[0], together.canvas[i])
        assert torch.equal(alone.is_valid[0], together.is_valid[i])


def test_greedy_nodes_are_different_canvases() -> None:
    """Formulas are different sets of ranks of one distribution, so no canvas of a step is evaluated twice."""
    pairs = [(position, token) for position in range(3) for token in range(2)]
    formulas: list[Formula] = [(pair,) for pair in pairs]
    formulas += [(a, b) for a in pairs for b in pairs if a[0] < b[0]]
    found = drafts_of(formulas, [MASK] * 4)
    assert found.is_valid.all()
    assert len(canvases(found)) == len(formulas)
