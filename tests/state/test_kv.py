"""The refresh rule, step by step."""

import numpy as np

from vllm_dllm.state.kv import RefreshPlan, RefreshSchedule


def plan(policy: RefreshSchedule, slots: list[int], starts: list[int]) -> list[tuple[int, int]]:
    made: RefreshPlan = policy.plan(np.array(slots), np.array(starts))
    return list(zip(made.index.tolist(), made.begin.tolist(), strict=True))


def test_dual_refreshes_when_a_block_begins() -> None:
    policy = RefreshSchedule("dual", None, max_num_reqs=4)
    assert plan(policy, [2, 0], [10, 7]) == [(0, 0), (1, 0)]
    assert plan(policy, [0, 2], [7, 10]) == []
    assert plan(policy, [0, 2], [7, 18]) == [(1, 0)]


def test_refresh_every_counts_from_the_blocks_begin() -> None:
    policy = RefreshSchedule("dual", 3, max_num_reqs=1)
    refreshed = [bool(plan(policy, [0], [start])) for start in [5] * 4 + [13] * 5]
    assert refreshed == [True, False, False, True, True, False, False, True, False]


def test_refresh_every_one_refreshes_always() -> None:
    policy = RefreshSchedule("dual", 1, max_num_reqs=1)
    assert [plan(policy, [0], [5]) for _ in range(3)] == [[(0, 0)]] * 3


def test_prefix_recomputes_what_follows_at_every_step() -> None:
    policy = RefreshSchedule("prefix", None, max_num_reqs=2)
    assert plan(policy, [0, 1], [4, 6]) == [(0, 0), (1, 0)]
    assert plan(policy, [0, 1], [4, 14]) == [(0, 4), (1, 0)]


def test_a_new_request_in_the_slot_begins_a_block_at_the_same_position() -> None:
    policy = RefreshSchedule("dual", None, max_num_reqs=1)
    plan(policy, [0], [5])
    policy.add_request(0)
    assert plan(policy, [0], [5]) == [(0, 0)]
