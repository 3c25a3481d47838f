"""Canvas state: slots, noise streams, unmasking and the beginning of blocks."""

import numpy as np
import torch

from vllm_dllm import noise
from vllm_dllm.state.canvas import CanvasState, RequestParams
from vllm_dllm.unmask.stats import RowStats

MASK = 3


def request(**changes: float) -> RequestParams:
    values = {
        "policy_id": 0,
        "threshold": 0.9,
        "factor": 1.0,
        "steps_per_block": 4,
        "row_len": 20,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 11,
    }
    return RequestParams(**(values | changes))  # type: ignore[arg-type]


def state_of(*requests: RequestParams, block_length: int = 4) -> CanvasState:
    state = CanvasState(len(requests), block_length, MASK, torch.device("cpu"))
    for slot, params in enumerate(requests):
        state.add_request(slot, params)
    state.apply_staged_writes()
    return state


def stats(tokens: list[int], confidence: list[float]) -> RowStats:
    return RowStats(torch.tensor(tokens), torch.tensor(confidence, dtype=torch.float64))


def step(state: CanvasState, slots: torch.Tensor, block_start: torch.Tensor, stats: RowStats) -> None:
    state.unmask(slots, state.noise_keys(slots, block_start).flatten(), stats)


def test_parameters_reach_the_device_when_staged_writes_are_applied() -> None:
    state = CanvasState(2, 4, MASK, torch.device("cpu"))
    state.add_request(1, request(seed=-(2**63), top_p=0.5))
    assert state.row_len.tolist() == [0, 0]
    state.apply_staged_writes()
    assert state.row_len.tolist() == [0, 20]
    params = state.sampling_params(torch.tensor([1]), np.array([1]), torch.tensor([0]))
    assert params.top_p.tolist() == [0.5] * 4


def test_one_position_per_step_by_confidence() -> None:
    state = state_of(request())
    slots, start = torch.tensor([0]), torch.tensor([8])
    step(state, slots, start, stats([50, 51, 52, 53], [0.1, 0.4, 0.3, 0.2]))
    assert state.canvas.tolist() == [[MASK, 51, MASK, MASK]]
    step(state, slots, start, stats([60, 61, 62, 63], [0.1, 0.9, 0.3, 0.2]))
    assert state.canvas.tolist() == [[MASK, 51, 62, MASK]]
    assert not state.is_finished(slots).item()


def test_predicting_the_mask_token_still_unmasks() -> None:
    state = state_of(request(steps_per_block=1))
    step(state, torch.tensor([0]), torch.tensor([0]), stats([MASK] * 4, [0.5] * 4))
    assert state.is_finished(torch.tensor([0])).item()


def test_reset_begins_a_block_for_the_marked_slots_alone() -> None:
    state = state_of(request(steps_per_block=1), request(steps_per_block=1))
    slots = torch.tensor([1, 0])
    step(state, slots, torch.tensor([0, 0]), stats([9] * 8, [0.5] * 8))
    state.reset(slots, torch.tensor([True, False]))
    assert state.canvas.tolist() == [[9] * 4, [MASK] * 4]
    assert state.is_masked.tolist() == [[False] * 4, [True] * 4]
    assert state.step.tolist() == [1, 0]


def test_random_policy_orders_by_its_noise_stream() -> None:
    state = state_of(request(policy_id=1, seed=5))
    slots, start = torch.tensor([0]), torch.tensor([16])
    keys = noise.stream_keys(torch.tensor(5), 16 + torch.arange(4), torch.tensor(4))
    expected = int(noise.uniform(keys, torch.tensor(noise.STREAM)).argmax())
    step(state, slots, start, stats([50, 51, 52, 53], [0.1, 0.4, 0.3, 0.2]))
    assert (~state.is_masked[0]).nonzero().flatten().tolist() == [expected]


def test_streams_depend_on_seed_position_and_progress() -> None:
    state = state_of(request(seed=1), request(seed=2))
    slots = torch.tensor([0, 1])
    before = state.noise_keys(slots, torch.tensor([0, 0]))
    moved = state.noise_keys(slots, torch.tensor([4, 4]))
    step(state, slots, torch.tensor([0, 0]), stats([9] * 8, [0.5] * 8))
    after = state.noise_keys(slots, torch.tensor([0, 0]))
    assert len(set(torch.cat([before, moved, after]).flatten().tolist())) == 24


def test_stages_are_skipped_when_no_request_of_the_batch_needs_them() -> None:
    state = state_of(request(), request(temperature=0.7, top_k=4), request(top_p=0.5))
    for slot, has_noise, has_filter in [(0, False, False), (1, True, True), (2, False, False)]:
        params = state.sampling_params(torch.tensor([slot]), np.array([slot]), torch.tensor([0]))
        assert (params.has_noise, params.has_filter) == (has_noise, has_filter)
