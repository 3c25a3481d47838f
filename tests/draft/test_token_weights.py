"""Token weights: what they score, and which tokens drafts have by them."""

import math
from dataclasses import replace

import pytest
import torch

from tests.draft.test_propose import CPU, MASK, candidates
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.graph import DraftGraph, Formula
from vllm_dllm.draft.propose import DraftNoise, Drafts, Roots, neighbours, propose
from vllm_dllm.draft.token_weights import LEAST_LOG_PROB, NONE, TokenWeights
from vllm_dllm.unmask.stats import Candidates

ROWS = candidates([[(10, 0.5), (20, 0.4)], [(20, 0.9), (21, 0.1)], [(20, 0.6), (31, 0.2)], [(40, 0.8), (20, 0.1)]])


def drafts_of(
    formulas: list[Formula], canvas: list[int], weights: TokenWeights | None, rows: Candidates = ROWS, **roots: object
) -> Drafts:
    root = torch.tensor([canvas])
    start = Roots(root, root == MASK, torch.zeros_like(root, dtype=torch.bool), rows)
    graph = DraftGraph(tuple(formulas), 1, tokens=weights)
    noise = roots.pop("noise", None)
    return propose(compile_graph(graph, CPU), replace(start, **roots), noise)  # type: ignore[arg-type]


def by_node(drafts: Drafts) -> dict[int, list[int]]:
    return dict(zip(drafts.node[0].tolist(), drafts.canvas[0].tolist(), strict=True))


def scores(weights: TokenWeights, tokens: list[int], log_probs: list[float], beside: list[int]) -> list[float]:
    return weights.scores(
        torch.tensor(tokens), torch.tensor(log_probs, dtype=torch.float64), torch.tensor(beside)
    ).tolist()


class TestScores:
    WEIGHTS = TokenWeights(2.0, -0.5, (-3.0, 0.25, 1.0, 7.0))

    def test_without_new_neighbours_the_slope_alone_counts(self) -> None:
        assert scores(self.WEIGHTS, [10, 11], [-1.0, -2.0], [NONE] * 4) == [-2.0, -4.0]

    def test_a_new_neighbour_beside_changes_the_slope(self) -> None:
        for beside in ([5, NONE, NONE, NONE], [NONE, 5, NONE, NONE], [5, 6, NONE, NONE]):
            assert scores(self.WEIGHTS, [10, 11], [-1.0, -2.0], beside) == [-1.5, -3.0]
        assert scores(self.WEIGHTS, [10, 11], [-1.0, -2.0], [NONE, NONE, 5, 6]) == [-2.0, -4.0]

    @pytest.mark.parametrize("place", range(4))
    def test_a_new_neighbour_with_the_same_token_counts_by_its_place(self, place: int) -> None:
        beside = [NONE] * 4
        beside[place] = 11
        slope = 1.5 if place < 2 else 2.0
        expected = [-slope, -2 * slope + self.WEIGHTS.same[place]]
        assert scores(self.WEIGHTS, [10, 11], [-1.0, -2.0], beside) == expected

    def test_neighbours_add_up(self) -> None:
        assert scores(self.WEIGHTS, [11], [-2.0], [11, 11, 11, 11]) == [-3.0 + (-3.0 + 0.25 + 1.0 + 7.0)]

    @pytest.mark.parametrize("log_prob", [-math.inf, math.nan, -99.0, LEAST_LOG_PROB])
    def test_no_candidate_is_less_probable_than_the_least(self, log_prob: float) -> None:
        assert scores(self.WEIGHTS, [10], [log_prob], [NONE] * 4) == [2.0 * LEAST_LOG_PROB]

    @pytest.mark.parametrize("log_prob", [-math.inf, math.nan])
    def test_an_impossible_candidate_is_no_token_whatever_its_id(self, log_prob: float) -> None:
        found = scores(self.WEIGHTS, [0, 0], [-2.0, log_prob], [0] * 4)
        assert found == [-3.0 + (-3.0 + 0.25 + 1.0 + 7.0), 1.5 * LEAST_LOG_PROB]

    def test_the_default_is_the_probability(self) -> None:
        assert scores(TokenWeights(), [10, 11], [-1.0, -2.0], [10, 11, 10, 11]) == [-1.0, -2.0]


def test_neighbours_end_with_the_block() -> None:
    found = neighbours(torch.tensor([[10, NONE, 12, 13]]), torch.tensor([[0, 1, 3]]))
    assert found.tolist() == [[[NONE, NONE, NONE, 12], [10, 12, NONE, 13], [12, NONE, NONE, NONE]]]


NOT_AGAIN = TokenWeights(same=(-9.0, 0.0, 0.0, 0.0))
CHAIN: list[Formula] = [((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0))]


def test_a_token_that_a_parent_put_left_of_a_position_is_not_put_there_again() -> None:
    """Position 1 is the readiest, then 3, then 2: beside it is the 20 of position 1 by then."""
    plain, weighed = (by_node(drafts_of(CHAIN, [MASK] * 4, weights)) for weights in (None, NOT_AGAIN))
    assert plain == {1: [MASK, 20, MASK, MASK], 2: [MASK, 20, MASK, 40], 3: [MASK, 20, 20, 40]}
    assert weighed == {1: [MASK, 20, MASK, MASK], 2: [MASK, 20, MASK, 40], 3: [MASK, 20, 31, 40]}


def test_what_the_last_step_unmasked_is_new_and_what_came_before_is_not() -> None:
    node: list[Formula] = [((1, 0),)]
    for is_new, token in ((True, 31), (False, 20)):
        new = torch.tensor([[False, is_new, False, False]])
        found = by_node(drafts_of(node, [MASK, 20, MASK, MASK], NOT_AGAIN, is_new=new))
        assert found == {1: [MASK, 20, token, MASK]}


def test_positions_of_one_step_do_not_see_each_other() -> None:
    """Both come in the same step, so that neither knew the other's token."""
    canvas = torch.full((1, 4), MASK)
    start = Roots(canvas, canvas == MASK, torch.zeros(1, 4, dtype=torch.bool), ROWS)
    graph = DraftGraph((((0, 0), (2, 0)),), 2, tokens=NOT_AGAIN)
    assert by_node(propose(compile_graph(graph, CPU), start, None)) == {1: [MASK, 20, 20, MASK]}


def test_vocab_ranks_follow_the_scores() -> None:
    rows = candidates([[(10, 0.5), (11, 0.3), (12, 0.2)], [(20, 0.9), (21, 0.1), (22, 0.0)]])
    formulas: list[Formula] = [((1, rank),) for rank in range(3)]
    found = by_node(drafts_of(formulas, [MASK] * 2, TokenWeights(-1.0), rows))
    assert [canvas[0] for _, canvas in sorted(found.items())] == [12, 11, 10]
    equal = by_node(drafts_of(formulas, [MASK] * 2, TokenWeights(0.0), rows))
    assert [canvas[0] for _, canvas in sorted(equal.items())] == [10, 11, 12], "equal scores go by probability"


def test_nodes_are_ordered_by_the_chance_that_the_weights_give() -> None:
    """Of equally ready positions, where one has a first candidate that the weights make improbable."""
    rows = candidates([[(20, 0.6), (11, 0.4)], [(20, 0.6), (11, 0.4)], [(30, 0.6), (31, 0.4)], [(30, 0.1)] * 2])
    new = torch.tensor([[True, False, False, False]])
    formulas: list[Formula] = [((0, 0),), ((0, 1),), ((1, 0),), ((1, 1),)]
    drafts = drafts_of(formulas, [20, MASK, MASK, MASK], NOT_AGAIN, rows, is_new=new)
    found = [tuple(canvas) for canvas in drafts.canvas[0].tolist()]
    chance = {
        (20, 11, MASK, MASK): 0.4 / (0.4 + 0.6 * math.exp(-9)),
        (20, MASK, 30, MASK): 0.6,
        (20, MASK, 31, MASK): 0.4,
        (20, 20, MASK, MASK): 0.6 * math.exp(-9) / (0.4 + 0.6 * math.exp(-9)),
    }
    assert found == sorted(chance, key=lambda canvas: -chance[canvas])
    given = torch.tensor([math.log(chance[canvas]) for canvas in found], dtype=torch.float64)
    ready = drafts.log_reach[0] - given  # the same for each: the positions' odds are
    torch.testing.assert_close(ready, ready[:1].expand(4))


def test_at_a_temperature_the_noise_chooses() -> None:
    """Two requests of the same root, of which the second one samples."""
    canvas = torch.full((2, 4), MASK)
    rows = Candidates(ROWS.token_ids.expand(2, -1, -1), ROWS.log_probs.expand(2, -1, -1))
    start = Roots(canvas, canvas == MASK, torch.zeros(2, 4, dtype=torch.bool), rows)
    noise = DraftNoise(
        seed=torch.tensor([1, 1]),
        position=torch.arange(4).expand(2, 4),
        temperature=torch.tensor([0.0, 0.5], dtype=torch.float64),
        top_k=torch.tensor([0, 0]),
        top_p=torch.tensor([1.0, 1.0], dtype=torch.float64),
        is_random=torch.tensor([False, False]),
    )
    absurd = TokenWeights(-50.0, 7.0, (90.0, -90.0, 1.0, 2.0))
    plain, weighed = (
        propose(compile_graph(DraftGraph(tuple(CHAIN), 1, tokens=weights), CPU), start, noise)
        for weights in (None, absurd)
    )
    assert torch.equal(weighed.canvas[1], plain.canvas[1])
    assert torch.equal(weighed.log_reach[1], plain.log_reach[1])
    alone = drafts_of(CHAIN, [MASK] * 4, absurd)
    assert torch.equal(weighed.canvas[0], alone.canvas[0])
    assert not torch.equal(weighed.canvas[0], plain.canvas[0])


def test_requests_of_the_policy_random_have_weights_too() -> None:
    noise = DraftNoise(
        seed=torch.tensor([1]),
        position=torch.arange(4)[None],
        temperature=torch.zeros(1, dtype=torch.float64),
        top_k=torch.tensor([0]),
        top_p=torch.ones(1, dtype=torch.float64),
        is_random=torch.tensor([True]),
    )
    plain, weighed = (drafts_of(CHAIN, [MASK] * 4, weights, noise=noise) for weights in (None, TokenWeights(-1.0)))
    first, last = (set(drafts.canvas.unique().tolist()) for drafts in (plain, weighed))
    assert torch.equal(plain.canvas == MASK, weighed.canvas == MASK), "their order is known"
    assert first != last
