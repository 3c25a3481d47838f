"""Pins by slot: what a block has of them when it begins, what a step refreshes for them, and which rows have them."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_plan import planned, segments
from tests.state.test_canvas import MASK, blocks, request, state_of
from vllm_dllm.engine.pins import write_pinned_rows
from vllm_dllm.engine.plan import plan_step
from vllm_dllm.state.kv import KvSchedule
from vllm_dllm.state.pins import OPEN, Pins, PinState

B = 4


def pins(begin: int, *tokens: int | None) -> Pins:
    return Pins(begin, np.array([OPEN if token is None else token for token in tokens], dtype=np.int64))


def test_what_is_given_of_some_positions() -> None:
    own = pins(10, None, 7, 8, None, 9)
    assert own.of(8, 5).tolist() == [OPEN, OPEN, OPEN, 7, 8]
    assert own.of(13, 4).tolist() == [OPEN, 9, OPEN, OPEN]
    assert own.of(2, 4).tolist() == own.of(20, 4).tolist() == [OPEN] * 4
    assert [own.num_masked(start, B) for start in (8, 10, 12, 14, 18)] == [1, 2, 2, 3, 4]


def test_a_block_has_its_pins_once_and_counts_them_as_known() -> None:
    state = state_of(request(prompt_len=10), request(prompt_len=9, pins=pins(9, 5, None, 6, None, None, 7)))
    slots = np.array([0, 1])
    state.pins.begin(state.canvas, slots, np.array([10, 8]))
    assert state.canvas.tolist() == [[MASK] * 4, [MASK, 5, MASK, 6]]
    assert state.policy_params(blocks(0, 1, start=8)).num_known.tolist() == [2, 3]  # of 1 and 2 prompt positions
    state.canvas[1] = MASK  # emitted: the next block
    state.pins.begin(state.canvas, slots, np.array([10, 8]))
    assert state.canvas[1].tolist() == [MASK] * 4, "a step that names a block that has ended"
    state.pins.begin(state.canvas, slots, np.array([10, 12]))
    assert state.canvas[1].tolist() == [MASK, MASK, 7, MASK]
    params = state.policy_params(blocks(1, start=12))
    assert params.num_known.tolist() == [1]
    assert params.of_next_block(B).num_known.tolist() == [0]


def test_the_next_request_of_a_slot_has_none() -> None:
    state = state_of(request(pins=pins(10, 5)), request())
    state.pins.begin(state.canvas, np.array([0]), np.array([10]))
    state.add_request(0, request())
    assert not list(state.pins.of(np.array([0, 1])))
    assert state.pins.is_next_open(np.array([0, 1]), np.array([6, 6])).all()


@pytest.mark.parametrize("name", ["dual", "prefix"])
def test_a_block_that_is_given_whole_stores_nothing(name: Any) -> None:
    kv = KvSchedule(name, None, B)
    kv.add(0, 0, pins=pins(5, 1, 2, 3, 4, None))
    assert segments(planned(kv, [5, 5])) == [(0, "ROOT", 5, 9), (1, "REFRESH", 0, 24)]
    assert segments(planned(kv, [9, 9])) == [(0, "REFRESH", 0, 24), (1, "REFRESH", 0, 24)]
    kv.forget(0)
    kv.add(0, 0)
    assert segments(planned(kv, [5, 9]))[0] == (0, "REFRESH", 0, 24)


def test_no_look_ahead_goes_where_something_is_given() -> None:
    state = PinState(B, torch.device("cpu"))
    state.put(3, pins(8, *[None] * 5, 7))
    assert state.is_next_open(np.array([2, 3]), np.array([8, 8])).tolist() == [True, False]
    assert state.is_next_open(np.array([2, 3]), np.array([4, 12])).tolist() == [True, True]
    kv, start = KvSchedule("block_causal", None, B), np.array([8, 8])
    for request_id in (0, 1):
        kv.add(request_id, 0)
        kv.note(request_id, 8)
    plan = plan_step(
        kv.step([0, 1], start, start + 8),
        block_start=start,
        seq_len=start + 8,
        num_drafts=np.array([5, 5]),
        block_length=B,
        kv_policy="block_causal",
        look_ahead_from=5,
        is_next_open=state.is_next_open(np.array([2, 3]), start),
    )
    assert (plan.looks_ahead.tolist(), plan.num_drafts.tolist()) == ([True, False], [3, 5])


def test_a_refresh_has_the_pins_behind_the_block() -> None:
    state = PinState(B, torch.device("cpu"))
    state.put(7, pins(9, 50, None, None, None, None, 51, 52, *[None] * 7, 53, 54))
    plan = planned(KvSchedule("dual", None, B), [5, 9])
    rows = torch.zeros(plan.num_rows, dtype=torch.int32)
    write_pinned_rows(rows, plan, state, np.array([2, 7]))
    # The block is 9 to 12; its own pin is in its canvas.
    assert {int(i) - 24: int(rows[i]) for i in rows.nonzero()} == {14: 51, 15: 52, 23: 53}
