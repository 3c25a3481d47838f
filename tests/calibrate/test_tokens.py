"""Token weights that are fitted to traces, counted with, and kept where they save something."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.calibrate.traces import MASK, make_block, make_trace, random_trace
from vllm_dllm.calibrate.build import make_graph, try_token_weights
from vllm_dllm.calibrate.count import Decoding, anchor_paths
from vllm_dllm.calibrate.simulate import count_forwards, draft_blocks
from vllm_dllm.calibrate.tokens import features, fit_choice, fit_token_weights, ordered, unmasked
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.token_weights import NONE, OFFSETS, TokenWeights

SETTINGS = DllmConfig(block_length=6, policy="static")


def stale_block(rng):
    """A block that is unmasked from the left, each position's first candidate being the token left of it.

    What comes is the second one. So the first one is wrong exactly where that token has just come.
    """
    text = rng.choice(np.arange(10, 90), 7, replace=False)
    block = make_block(text[1:].tolist(), [[i] for i in range(6)], [0.6] * 6, wrong=range(6))
    block.token_ids[:, :, 0] = text[:-1]
    return block


def stale_traces(count, seed=0):
    rng = np.random.default_rng(seed)
    return [make_trace(stale_block(rng), stale_block(rng), prompt_idx=i) for i in range(count)]


def test_unmasked_positions_see_who_is_new():
    block = make_block([50, 51, 52, 53], [[0], [1], [2, 3]], [0.9, 0.8, 0.7, 0.6])
    rows = unmasked(block, MASK)
    found = {key: (int(came), beside) for key, came, beside in zip(rows, rows.came, rows.beside.tolist(), strict=True)}
    assert found == {
        # Step 0 made the root, so what it unmasked is new too.
        (0, 1, 1): (51, [50, NONE, NONE, NONE]),
        (0, 2, 2): (52, [51, NONE, 50, NONE]),
        (0, 2, 3): (53, [NONE, NONE, 51, NONE]),
        (1, 2, 2): (52, [51, NONE, NONE, NONE]),
        (1, 2, 3): (53, [NONE, NONE, 51, NONE]),
    }
    assert set(unmasked(block, MASK, 1)) == {(0, 1, 1), (1, 2, 2), (1, 2, 3)}


def test_rows_have_the_statistics_of_their_anchor():
    rng = np.random.default_rng(0)
    block = random_trace(rng).blocks[0]
    block.log_probs[:] += np.arange(block.num_steps)[:, None, None] / 100
    rows = unmasked(block, MASK)
    assert len(rows.came) == sum(range(block.num_steps))
    for i, (anchor, _, position) in enumerate(rows):
        assert rows.token_ids[i].tolist() == block.token_ids[anchor, position].tolist()
        assert rows.log_probs[i].tolist() == block.log_probs[anchor, position].tolist()


def test_candidates_are_ordered_by_the_scores():
    block = make_block([50, 51, 52], [[0], [1], [2]], [0.9, 0.8, 0.7])
    order = ordered(block, MASK, lambda ids, log_probs, beside: log_probs + 9.0 * (beside[:, :1] == 51) * (ids == 52))
    assert order(0, 1, 1).tolist() == block.token_ids[0, 1].tolist()
    assert order(0, 2, 2)[0] == 52
    assert order(1, 2, 2)[0] == 52
    last = ordered(block, MASK, lambda ids, log_probs, beside: -log_probs)
    assert last(0, 2, 2).tolist() == block.token_ids[0, 2, ::-1].tolist()


def test_weights_are_found_again():
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.arange(4).expand(6000, -1)
    log_probs = (torch.rand(6000, 4, generator=generator, dtype=torch.float64) * 3).log_softmax(-1)
    log_probs = log_probs.sort(descending=True)[0]
    beside = torch.randint(0, 4, (6000, len(OFFSETS)), generator=generator)
    beside[torch.rand(beside.shape, generator=generator) < 0.5] = NONE
    given = TokenWeights(2.0, -1.0, (-1.5, 0.5, 0.0, 1.0))
    chance = given.scores(token_ids, log_probs, beside).softmax(-1)
    truth = torch.multinomial(chance, 1, generator=generator)[:, 0]
    found = fit_choice(features(token_ids, log_probs, beside), truth).tolist()
    assert found == pytest.approx([2.0, -1.0, *given.same], abs=0.25)


def test_a_token_that_never_comes_beside_itself_loses_its_odds():
    weights = fit_token_weights(stale_traces(10), MASK)
    assert weights is not None
    assert weights.same[0] < -2.0 < weights.same[1]
    assert all(value == round(value, 4) for value in (weights.slope, weights.slope_beside_new, *weights.same))


@pytest.mark.parametrize("wrong", [None, 0])
def test_nothing_to_learn_from(wrong):
    """Blocks of one step have nobody who drafts, and of tokens that were no candidate nothing can be said."""
    steps = [[0, 1, 2]] if wrong == 0 else [[0], [1], [2]]
    block = make_block([50, 51, 52], steps, [0.5] * 3, wrong=dict.fromkeys(range(3), wrong))
    assert fit_token_weights([make_trace(block)], MASK) is None


def test_counting_follows_the_weights():
    trace = stale_traces(1)[0]
    plain = anchor_paths([trace], Decoding(MASK))
    weighed = anchor_paths([trace], Decoding(MASK, tokens=TokenWeights(1.0, same=(-9.0, 0.0, 0.0, 0.0))))
    assert plain[0] == (((0, 1),), ((0, 1), (1, 1)), ((0, 1), (1, 1), (2, 1)), ((0, 1), (1, 1), (2, 1), (3, 1)))
    assert weighed[0] == (((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0)), ((0, 0), (1, 0), (2, 0), (3, 0)))
    hot = {"temperature": 1.0}
    assert anchor_paths([trace], Decoding(MASK, **hot)) == anchor_paths(
        [trace], Decoding(MASK, **hot, tokens=TokenWeights(1.0, same=(-9.0, 0.0, 0.0, 0.0)))
    )


def test_counts_and_proposals_agree():
    """What counting calls a true future state is what the engine's drafts find, node by node."""
    rng = np.random.default_rng(5)
    traces = [*stale_traces(6), *(random_trace(rng, prompt_idx=i, block_length=6) for i in range(6))]
    decoding = Decoding(MASK, tokens=TokenWeights(1.5, -0.4, (-2.0, 0.5, 0.0, 0.3)))
    graph = make_graph(traces, decoding, SETTINGS, 12)
    assert graph.tokens == decoding.tokens
    came_true = np.zeros(1 + len(graph), int)
    for block in draft_blocks(graph, traces, decoding):
        np.add.at(came_true, block.node[block.ahead > 0], 1)
    # A node is filled along its first parents; a trace may come to it by another one, where tokens rank otherwise.
    chain = [n for n, parents in enumerate(graph.parents, start=1) if parents == (graph.parents[n - 1][0],)]
    assert len(chain) >= 3
    assert all(came_true[n] == graph.counts[n - 1] for n in chain if graph.depths[n - 1] <= 2)


def test_weights_that_save_forwards_help():
    used, held_out = stale_traces(12), stale_traces(4, seed=1)
    # Half of the blocks are as foreseen, so that no order of candidates is right everywhere but that by neighbours.
    rng = np.random.default_rng(2)
    even = [
        make_trace(make_block(rng.integers(10, 90, 6).tolist(), [[i] for i in range(6)], [0.6] * 6), prompt_idx=20 + i)
        for i in range(16)
    ]
    used, held_out = [*used, *even[:12]], [*held_out, *even[12:]]
    decoding = Decoding(MASK)
    graph = make_graph(used, decoding, SETTINGS, 8)
    trial = try_token_weights(graph, used, held_out, decoding, SETTINGS, (2, 4), 8)
    assert trial is not None
    assert trial.helps
    assert trial.with_weights < 0.9 * trial.without
    for of, said in ((graph, trial.without), (trial.graph, trial.with_weights)):
        blocks = draft_blocks(of, held_out, decoding)
        assert said == sum(count_forwards(blocks, budget).with_drafts for budget in (2, 4)) / 2 / len(held_out)
    worse = replace(trial, with_weights=trial.without)
    assert not worse.helps


def test_nobody_tries_weights_at_a_temperature():
    traces = stale_traces(4)
    decoding = Decoding(MASK, temperature=0.7)
    graph = make_graph(traces, decoding, SETTINGS, 8)
    assert try_token_weights(graph, traces, traces, decoding, SETTINGS, (2,), 8) is None
