"""Fixed cases of the denoiser with drafts: the same in each run, so that no fault hides by chance."""

import functools
from dataclasses import replace
from typing import get_args

import pytest
import torch

from tests.draft.test_exact import (
    CPU,
    DREAM,
    LLADA,
    MASK,
    REFERENCE_RULES,
    SDAR,
    VOCAB,
    Request,
    SyntheticModel,
    denoise,
    reference_budget,
)
from tests.draft.test_look_ahead import ChainModel, Row, decode, reference_options, step
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.native import native_nodes
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.draft.token_weights import TokenWeights
from vllm_dllm.names import PolicyName
from vllm_dllm.reference import policy, spiffy
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import native_walk

BLOCK_LENGTH = 8

CHAIN = DraftGraph(tuple(tuple((i, 0) for i in range(n)) for n in range(1, 8)), tokens_per_step=1)
ALTERNATIVES = DraftGraph(
    (
        *(((0, 0),), ((0, 1),), ((1, 0),), ((2, 0),)),
        *(((0, 0), (1, 0)), ((0, 0), (1, 1)), ((0, 1), (1, 0)), ((0, 0), (2, 0)), ((1, 0), (2, 0))),
        *(((0, 0), (1, 0), (2, 0)), ((0, 0), (1, 0), (3, 0)), ((0, 0), (1, 0), (2, 0), (3, 0))),
    ),
    tokens_per_step=None,
    counts=(90, 30, 40, 20, 60, 10, 15, 12, 11, 50, 8, 40),
    num_anchors=100,
    readiness=Readiness(0.5, (0.4, -0.3), 0.2),
    expected=(80.0, 35.0, 42.0, 25.0, 55.0, 12.0, 15.0, 10.0, 12.0, 45.0, 9.0, 35.0),
)
WEIGHED = replace(ALTERNATIVES, tokens=TokenWeights(1.75, -0.5, (-3.0, 1.5, 0.75, -0.25)))
ABSURD = replace(ALTERNATIVES, tokens=TokenWeights(-100.0, 50.0, (100.0, -100.0, 100.0, 0.0)))


def request(name: PolicyName, idx: int, rules: UnmaskRules) -> Request:
    """One request of each policy: some sample, some with filters, and behind a prompt's tail where rules have one."""
    token = torch.arange(VOCAB)[torch.arange(VOCAB) != MASK].tolist()
    return Request(
        policy=name,
        threshold=(0.3, 0.9)[idx % 2],
        steps=(8, 4)[idx % 2],
        temperature=(0.0, 0.7, 0.0)[idx % 3],
        top_k=(0, 4)[idx // 3 % 2] * (name != "credit"),
        top_p=(1.0, 0.8)[idx // 2 % 2 * (name != "credit")],
        seed=idx,
        alg_temp=(0.0, 0.5)[idx // 4 % 2],
        tail=tuple(token[: idx % 3]) if rules is SDAR else (),
        credit=(3.0, 0.9, 0.5),
    )


MODELS = ((0, 0.5), (1, 3.0), (2, 12.0))
"""Seed and sharpness."""


@functools.cache
def made_by_reference(
    rules: UnmaskRules, graph: DraftGraph, budget: int, seed: int, sharpness: float
) -> list[spiffy.SpiffyGeneration]:
    """Decode each request alone, once for the ops and torch."""
    return [
        spiffy.generate(
            SyntheticModel(BLOCK_LENGTH, seed, sharpness),
            torch.tensor(each.tail, dtype=torch.int64),
            graph=graph,
            budget=reference_budget(budget, rules, BLOCK_LENGTH),
            rules=REFERENCE_RULES[rules],
            **each.reference(BLOCK_LENGTH),
        )
        for each in requests_under(rules)
    ]


def requests_under(rules: UnmaskRules) -> list[Request]:
    return [request(name, idx, rules) for idx, name in enumerate((*get_args(PolicyName), "credit", "credit"))]


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
@pytest.mark.parametrize(
    ("graph", "budget"),
    [(CHAIN, 7), (ALTERNATIVES, 5), (WEIGHED, 5), (ABSURD, 12)],
    ids=["chain", "alternatives", "weighed", "absurd"],
)
@pytest.mark.parametrize("rules", [LLADA, DREAM, SDAR], ids=["llada", "dream", "sdar"])
def test_drafts_are_accepted_as_often_as_in_the_reference(
    rules: UnmaskRules, graph: DraftGraph, budget: int, is_native: bool
) -> None:
    requests = requests_under(rules)
    for seed, sharpness in MODELS:
        model = SyntheticModel(BLOCK_LENGTH, seed, sharpness)
        tokens, forwards, accepted = denoise(model, requests, graph, budget, is_native=is_native, rules=rules)
        expected = made_by_reference(rules, graph, budget, seed, sharpness)
        assert tokens == [[*each.tail, *e.tokens.tolist()] for each, e in zip(requests, expected, strict=True)]
        assert (forwards, accepted) == ([e.nfe for e in expected], [e.num_accepted for e in expected])


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
@pytest.mark.parametrize(
    ("graph", "budget"),
    [(CHAIN, 7), (ALTERNATIVES, 6), (WEIGHED, 6)],
    ids=["chain", "alternatives", "weighed"],
)
def test_look_aheads_are_accepted_as_often_as_in_the_reference(graph: DraftGraph, budget: int, is_native: bool) -> None:
    requests, num_over = [request(name, idx, SDAR) for idx, name in enumerate(get_args(PolicyName))], 0
    for block_length, seed in ((2, 0), (4, 1), (8, 2)):
        model = ChainModel(block_length, seed, 12.0)
        served = [replace(each, steps=min(each.steps, block_length), tail=each.tail[:1]) for each in requests]
        rows = decode(model, served, graph, budget, 3, is_native=is_native)
        for row, each in zip(rows, served, strict=True):
            prompt, options = torch.tensor(each.tail, dtype=torch.int64), reference_options(each, model, 3)
            expected = spiffy.generate(model, prompt, graph=graph, budget=budget, rules=policy.SDAR, **options)
            assert row.tokens == [*each.tail, *expected.tokens.tolist()]
            assert row.took.tolist() == [expected.nfe, expected.num_accepted, expected.num_proposed]
            num_over += row.num_over
    assert num_over > 5


def test_a_new_block_has_no_drafts_before_its_first_step() -> None:
    """What the last block's candidates foresaw says nothing of it."""
    state = CanvasState(2, BLOCK_LENGTH, MASK, CPU, SDAR)
    rows = [Row(Request("static", 0.9, 8, 0.0, 0, 1.0, 0), slot, state, num_blocks=2) for slot in (0, 1)]
    state.apply_staged_writes()
    drafter = GraphDrafter(CHAIN, choose=lambda _: native_nodes)
    head = LogitsHead(lambda hidden: hidden.clone(), VOCAB, MASK, is_native=True)
    denoiser = Denoiser(state, drafter, head, native_walk, draw=native_draws)
    for row in rows:
        step(ChainModel(BLOCK_LENGTH, 0, 12.0), denoiser, row, budget=0, look_ahead_from=None)
    slots = torch.tensor([0, 1])
    blocks = Blocks(slots, slots.numpy(), torch.zeros_like(slots))
    assert denoiser.nodes(blocks, 3).is_valid.all()
    denoiser.begin_blocks(slots, torch.tensor([True, False]))
    assert denoiser.nodes(blocks, 3).is_valid.tolist() == [[True, False, False, False], [True] * 4]
