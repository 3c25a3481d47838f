"""Canvas state: slots, noise streams and the beginning of blocks."""

from typing import Any

import numpy as np
import torch

from vllm_dllm import noise
from vllm_dllm.ops.vocab_stats import RowSampling
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.edits import LogitEdits
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import Nodes

MASK = 3


def request(**changes: Any) -> RequestParams:
    values: dict[str, Any] = {
        "policy_id": 0,
        "threshold": 0.9,
        "factor": 1.0,
        "entropy_bound": 0.35,
        "credit_alpha": 0.7,
        "credit_beta": 0.8,
        "credit_gamma": 0.2,
        "alg_temp": 0.0,
        "counts": (1, 2, 1, 1),
        "times": (0.75, 0.5, 0.25, 0.0),
        "prompt_len": 10,
        "seq_len": 20,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 11,
    }
    return RequestParams(**(values | changes))


def state_of(*requests: RequestParams, block_length: int = 4) -> CanvasState:
    state = CanvasState(len(requests), block_length, MASK, torch.device("cpu"))
    for slot, params in enumerate(requests):
        state.add_request(slot, params)
    state.apply_staged_writes()
    return state


def blocks(*slots: int, start: int = 0) -> Blocks:
    return Blocks(torch.tensor(slots), np.array(slots), torch.full((len(slots),), start))


def sampling(state: CanvasState, of: Blocks, num_masked: torch.Tensor) -> RowSampling:
    return state.row_sampling(of.slots_np, of.slots, of.start, num_masked)


def keys(state: CanvasState, *slots: int, start: int = 0, num_masked: int = 4) -> torch.Tensor:
    return sampling(state, blocks(*slots, start=start), torch.full((len(slots),), num_masked)).keys


def test_parameters_reach_the_device_when_staged_writes_are_applied() -> None:
    state = CanvasState(2, 4, MASK, torch.device("cpu"))
    state.add_request(1, request(seed=-(2**63), top_p=0.5, temperature=0.7))
    assert state.seq_len.tolist() == [0, 0]
    state.apply_staged_writes()
    assert state.seq_len.tolist() == [0, 20]
    params = sampling(state, blocks(1, 1), torch.tensor([4, 2]))
    assert params.top_p.tolist() == [0.5] * 8


def test_policies_are_gathered_with_their_tables_and_the_prompts_tail() -> None:
    first = request(policy_id=POLICY_IDS["origin"], times=(0.5, 0.0, 0.0, 0.0))
    state = state_of(first, request(alg_temp=0.5), request(counts=(4, 4, 4, 4), prompt_len=6))
    params = state.policy_params(Blocks(torch.tensor([2, 0]), np.array([2, 0]), torch.tensor([4, 8])))
    assert params.policy_id.tolist() == [0, POLICY_IDS["origin"]]
    assert params.policies == ("static", "origin")
    assert params.num_known.tolist() == [2, 2]
    assert params.counts.T.tolist() == [[4] * 4, [1, 2, 1, 1]]
    assert params.times.T.tolist() == [[0.75, 0.5, 0.25, 0.0], [0.5, 0.0, 0.0, 0.0]]
    assert not params.has_alg_temp
    assert state.policy_params(blocks(1, start=12)).has_alg_temp
    assert state.policy_params(blocks(1, 2, start=12)).num_known.tolist() == [0, 0]
    early = state.policy_params(blocks(2, 0, start=4))
    assert (early.num_known.tolist(), early.counts[1].tolist()) == ([2, 6], [4, 2])
    assert early.of_next_block(4).num_known.tolist() == [0, 2]


def test_statistics_of_the_sampled_distribution_are_asked_for_where_a_policy_reads_them() -> None:
    state = CanvasState(2, 4, MASK, torch.device("cpu"), UnmaskRules(confidence="sampled"))
    for slot, temperature in enumerate([0.0, 0.7]):
        state.add_request(slot, request(temperature=temperature))
    assert sampling(state, blocks(0, 1), torch.tensor([4, 4])).wants_sampled
    assert not sampling(state_of(request(temperature=0.7)), blocks(0), torch.tensor([4])).wants_sampled


def test_reset_begins_a_block_for_the_marked_slots_alone() -> None:
    state = state_of(request(), request())
    state.canvas[:] = 9
    state.reset(torch.tensor([1, 0]), torch.tensor([True, False]))
    assert state.canvas.tolist() == [[9] * 4, [MASK] * 4]


def test_what_a_policy_remembers_is_empty_when_a_block_begins() -> None:
    credit = request(policy_id=POLICY_IDS["credit"])
    state = state_of(request(), credit, credit)
    assert state.policy_state(blocks(0)) == {}
    remembered = state.policy_state(blocks(2, 1))
    assert {name: field[0, 0].tolist() for name, field in remembered.items()} == {
        "credit_ids": [-1] * 8,
        "credits": [0.0] * 8,
    }
    remembered["credit_ids"][:, 3, 0], remembered["credits"][:, 3, 0] = torch.tensor([7, 8]), torch.tensor([0.5, 0.75])
    state.remember(torch.tensor([2, 1]), remembered)
    state.reset(torch.tensor([0, 1]), torch.tensor([True, False]))
    assert state.policy_state(blocks(1, 2))["credit_ids"][:, 3, 0].tolist() == [8, 7]
    state.reset(torch.tensor([2, 1]), torch.tensor([True, False]))
    after = state.policy_state(blocks(1, 2))
    assert (after["credit_ids"][:, 3, 0].tolist(), after["credits"][:, 3, 0].tolist()) == ([8, -1], [0.75, 0.0])


def test_streams_depend_on_seed_position_and_progress() -> None:
    state = state_of(request(seed=1, temperature=0.7), request(seed=2, temperature=0.7))
    streams = [keys(state, 0, 1), keys(state, 0, 1, start=4), keys(state, 0, 1, num_masked=3)]
    assert len(set(torch.cat(streams).tolist())) == 24


def test_streams_of_a_node_are_those_of_its_canvas() -> None:
    state = state_of(request(seed=1, temperature=0.7), request(seed=2, temperature=0.7))
    together = sampling(state, blocks(0, 0, 1, 1, start=8), torch.tensor([4, 3, 2, 1])).keys.view(2, 2, 4)
    for slot, node, num_masked in [(0, 0, 4), (0, 1, 3), (1, 0, 2), (1, 1, 1)]:
        assert together[slot, node].tolist() == keys(state, slot, start=8, num_masked=num_masked).tolist()
    expected = noise.stream_keys(torch.tensor(2), 8 + torch.arange(4), torch.tensor(1))
    assert together[1, 1].tolist() == expected.tolist()


def test_stages_are_skipped_when_no_request_of_the_batch_needs_them() -> None:
    state = state_of(request(), request(temperature=0.7, top_k=4), request(top_p=0.5), request(policy_id=1))
    for slot, is_sampled, has_filter in [(0, False, False), (1, True, True), (2, False, False), (3, False, False)]:
        params = sampling(state, blocks(slot), torch.tensor([4]))
        assert (state.is_sampled(np.array([slot])), params.has_filter) == (is_sampled, has_filter)
        assert (state.draft_noise(blocks(slot)) is None) == (slot in {0, 2})


def test_the_row_left_of_a_block_is_kept_from_its_refresh() -> None:
    left = torch.tensor([[-1.0], [-2.0], [-3.0]])
    state = CanvasState(3, 4, MASK, torch.device("cpu"), left=left)
    assert state.keeps_left
    hidden = torch.arange(16.0)[:, None]  # four nodes of four positions; the third is a refresh
    rows = state.predicting_rows(torch.tensor([2, 2, 0, 1]), hidden, torch.tensor([2]))
    assert rows.flatten().tolist() == [-3, 1, 2, 3, -3, 5, 6, 7, 8, 9, 10, 11, -2, 13, 14, 15]
    again = state.predicting_rows(torch.tensor([0]), torch.zeros(4, 1), None)
    assert again.flatten().tolist() == [8, 0, 0, 0]
    own = state.predicting_rows(torch.tensor([1, 1, 2]), torch.arange(12.0)[:, None], torch.tensor([0, 1]))
    assert own.flatten().tolist() == [*range(8), -3, 9, 10, 11], "each canvas has a row of its own"
    assert not state_of(request()).keeps_left


def test_edits_see_what_a_drafts_front_knows() -> None:
    """Of a window behind a draft's front: tokens up to the root, the draft's own, and none that once stood there."""
    edits = LogitEdits(repetition=1.5, bad_words=((7, 8),))
    state = state_of(request(edits=edits))
    state.edits.history = torch.full((1, 40), 5, dtype=torch.int32)  # positions behind the root, too
    root, front = 12, torch.tensor([[6, 7, MASK, 9, MASK, MASK, MASK, MASK]])
    nodes = Nodes.of_roots(torch.tensor([[MASK, 9, MASK, MASK]]), MASK)
    found, _ = state.row_edits(blocks(0, start=root + 2), nodes, (torch.tensor([root]), front))
    assert found is not None
    assert found.penalties is not None
    line = found.penalties.ids[0].tolist()
    assert line[:20] == [5] * 12 + [6, 7, MASK, 9] + [MASK] * 4
    assert found.penalties.num_generated[0, [0, 10, 12, 13, 15]].tolist() == [2, 2, 1, 1, 1]
    assert found.barred is not None
    assert 8 in found.barred[0], "it would complete the word that the front begins"
    assert 8 not in found.barred[2]
