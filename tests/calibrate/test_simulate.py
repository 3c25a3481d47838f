"""Forwards that drafts save on traces, with known answers."""

import numpy as np
import pytest

from tests.calibrate.traces import MASK, make_block, make_trace, random_trace
from vllm_dllm.calibrate.build import make_graph, predict, split, tokens_per_step
from vllm_dllm.calibrate.count import Decoding, anchor_paths
from vllm_dllm.calibrate.select import accept_length
from vllm_dllm.calibrate.simulate import count_forwards, draft_blocks, until_eos
from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.errors import ConfigError
from vllm_dllm.unmask.schedule import UnmaskRules

EVEN, DREAM = UnmaskRules(), UnmaskRules("timesteps", unmasks_first_alone=True)
CHAIN = DraftGraph((((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0))), 1)
TEXT, CONFIDENCE = [50, 51, 52, 53, 54], [0.9, 0.8, 0.7, 0.6, 0.5]


def forwards(graph, traces, budget, **decoding):
    return count_forwards(draft_blocks(graph, traces, Decoding(MASK, **decoding)), budget)


@pytest.mark.parametrize(("budget", "with_drafts"), [(0, 5), (1, 3), (2, 3), (3, 2)])
def test_a_chain_that_always_comes_true(budget, with_drafts):
    """The refresh makes step 1; each forward one step and what its drafts save, but none for the finished canvas."""
    trace = make_trace(make_block(TEXT, [[i] for i in range(5)], CONFIDENCE))
    found = forwards(CHAIN, [trace], budget)
    assert (found.without, found.with_drafts, found.refreshes) == (5, with_drafts, 1)
    assert found.ratio == 5 / with_drafts


def test_drafts_that_never_come_true():
    trace = make_trace(make_block(TEXT, [[i] for i in reversed(range(5))], CONFIDENCE))
    found = forwards(CHAIN, [trace], 1)
    # The last step has one masked position: no draft.
    assert (found.with_drafts, found.proposed, found.accepted) == (5, (3,), (0,))


def test_acceptance_by_depth():
    # The chain of anchor 0 comes true for one step; that of anchor 2 too, and its second draft would be finished.
    trace = make_trace(make_block(TEXT, [[0], [1], [3], [2], [4]], CONFIDENCE))
    found = forwards(CHAIN, [trace], 2)
    assert (found.with_drafts, found.proposed, found.accepted) == (3, (2, 1), (2, 0))
    assert found.acceptance == (1.0, 0.0)


def test_steps_of_several_positions():
    trace = make_trace(make_block(TEXT, [[0], [1, 2], [3], [4]], CONFIDENCE))
    graph = DraftGraph((((0, 0),), ((0, 0), (1, 0))), None)
    # The draft of two positions is the next canvas, that of one is no canvas of the trace.
    assert forwards(graph, [trace], 2).with_drafts == 3


@pytest.mark.parametrize(("most_per_step", "per_step"), [(1, 1), (3, None)], ids=["one", "varying"])
def test_counts_and_proposals_agree(most_per_step, per_step):
    """What counting calls a true future state is what the engine's drafts find, node by node."""
    rng = np.random.default_rng(2)
    traces = [random_trace(rng, prompt_idx=i, most_per_step=most_per_step) for i in range(10)]
    settings = DllmConfig(policy="static" if per_step else "threshold", block_length=8)
    decoding = Decoding(MASK)
    graph = make_graph(traces, decoding, settings, 12)
    came_true = np.zeros(1 + len(graph), int)
    for block in draft_blocks(graph, traces, decoding):
        np.add.at(came_true, block.node[block.ahead > 0], 1)
    assert tuple(came_true[1:]) == graph.counts
    assert graph.expected is not None
    assert all(value > 0 for value in graph.expected)


def test_a_node_that_was_chosen_before_its_parent_comes_behind_it():
    text, confidence = [10, 11, 12, 13, 14], [0.9, 0.8, 0.7, 0.6, 0.5]
    often, once = [[0], [1, 2], [3, 4]], [[0], [1], [2, 3], [4]]
    traces = [make_trace(make_block(text, steps, confidence)) for steps in (often, often, once)]
    graph = make_graph(traces, Decoding(MASK), DllmConfig(policy="threshold", block_length=5), 12)
    assert {((0, 0),), ((0, 0), (1, 0))} <= set(graph.formulas)
    assert all(max(parents) <= number for number, parents in enumerate(graph.parents))


def test_a_walk_is_the_leading_part_of_the_path():
    rng = np.random.default_rng(3)
    traces = [random_trace(rng, prompt_idx=i) for i in range(10)]
    graph = make_graph(traces, Decoding(MASK), DllmConfig(block_length=8), 12)
    paths = anchor_paths(traces, Decoding(MASK, readiness=graph.readiness))
    lengths = [accept_length(path, set(graph.formulas)) for path in paths]
    blocks = draft_blocks(graph, traces, Decoding(MASK))
    found = [
        next(depth for depth in range(1, 9) if depth not in set(ahead)) - 1 for block in blocks for ahead in block.ahead
    ]
    assert found == lengths


def test_coupled_drafts_follow_the_noise_of_the_policy_random():
    import torch

    from vllm_dllm import noise

    seed, masked, steps = 7, list(range(5)), []
    while masked:
        keys = noise.stream_keys(torch.tensor(seed), torch.tensor(masked), torch.tensor(len(masked)))
        steps.append([masked.pop(int(noise.uniform(keys, torch.tensor(noise.STREAM)).argmax()))])
    trace = make_trace(make_block(TEXT, steps, CONFIDENCE, start=0), seed=seed)
    assert forwards(CHAIN, [trace], 3, is_random=True).with_drafts == 2


def test_prediction_has_every_budget_and_the_text_alone():
    eos = TEXT[2]
    block = make_block(TEXT, [[i] for i in range(5)], CONFIDENCE)
    trace = make_trace(block, block)
    prediction = predict(CHAIN, [trace, trace], Decoding(MASK), eos, [1, 3])
    assert {budget: found.with_drafts for budget, found in prediction.whole.items()} == {1: 12, 3: 8}
    assert {budget: found.with_drafts for budget, found in prediction.until_eos.items()} == {1: 6, 3: 4}
    assert until_eos(trace, 999) == trace
    assert until_eos(trace, [999, eos]) == until_eos(trace, eos) != trace


@pytest.mark.parametrize(("num_prompts", "held_out", "expected"), [(40, 0.25, 10), (2, 0.01, 1), (3, 0.99, 2)])
def test_split(num_prompts, held_out, expected):
    used, rest = split(num_prompts, held_out, seed=1)
    assert len(rest) == expected
    assert sorted(used + rest) == list(range(num_prompts))
    assert split(num_prompts, held_out, seed=1) == (used, rest)


@pytest.mark.parametrize(
    ("settings", "rules", "expected"),
    [
        ({}, EVEN, 1),
        ({"steps_per_block": 16}, EVEN, 2),
        ({"steps_per_block": 24}, EVEN, None),
        ({"steps_per_block": 11}, EVEN, 3),  # the last step takes two
        ({"steps_per_block": 1}, EVEN, 32),
        ({"policy": "random"}, EVEN, 1),
        ({"policy": "entropy"}, DREAM, 1),  # and two in the last one
        ({"policy": "entropy", "steps_per_block": 8}, DREAM, None),
        ({"policy": "threshold"}, EVEN, None),
        ({"policy": "dynamic"}, EVEN, None),
    ],
)
def test_tokens_per_step(settings, rules, expected):
    assert tokens_per_step(DllmConfig(**settings), rules) == expected


def test_blocks_that_are_done_at_once_leave_nothing_to_draft():
    trace = make_trace(make_block(TEXT, [[0, 1, 2], [3, 4]], CONFIDENCE))
    with pytest.raises(ConfigError, match="no future state of 1 steps could be drafted"):
        make_graph([trace], Decoding(MASK), DllmConfig(policy="threshold", block_length=5), 3)
