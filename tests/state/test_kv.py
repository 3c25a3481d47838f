"""What each KV policy stores before a step, step by step."""

import numpy as np
import pytest
import torch

from vllm_dllm.state.kv import KvSchedule

ROW_LEN = 90


def plan(policy: KvSchedule, slots: list[int], starts: list[int]) -> list[tuple[int, int, int]]:
    row_len = np.full(len(slots), ROW_LEN) + np.array(slots)
    made = policy.plan(np.array(slots), np.array(starts), row_len)
    return list(zip(made.index.tolist(), made.begin.tolist(), made.end.tolist(), strict=True))


def commits(policy: KvSchedule, slots: list[int], starts: list[int]) -> list[bool]:
    return policy.commits(np.array(slots), np.array(starts)).tolist()


def test_dual_refreshes_when_a_block_begins() -> None:
    policy = KvSchedule("dual", None, 8, max_num_reqs=4)
    assert plan(policy, [2, 0], [10, 7]) == [(0, 0, 92), (1, 0, 90)]
    assert plan(policy, [0, 2], [7, 10]) == []
    assert plan(policy, [0, 2], [7, 18]) == [(1, 0, 92)]


def test_refresh_every_counts_from_the_blocks_begin() -> None:
    policy = KvSchedule("dual", 3, 8, max_num_reqs=1)
    refreshed = [bool(plan(policy, [0], [start])) for start in [5] * 4 + [13] * 5]
    assert refreshed == [True, False, False, True, True, False, False, True, False]


def test_refresh_every_one_refreshes_always() -> None:
    policy = KvSchedule("dual", 1, 8, max_num_reqs=1)
    assert [plan(policy, [0], [5]) for _ in range(3)] == [[(0, 0, 90)]] * 3


def test_prefix_recomputes_what_follows_at_every_step() -> None:
    policy = KvSchedule("prefix", None, 2, max_num_reqs=2)
    assert plan(policy, [0, 1], [4, 6]) == [(0, 0, 90), (1, 0, 91)]
    assert plan(policy, [0, 1], [4, 14]) == [(0, 4, 90), (1, 0, 91)]


@pytest.mark.parametrize("name", ["dual", "prefix"])
def test_a_new_request_in_the_slot_begins_a_block_at_the_same_position(name: str) -> None:
    policy = KvSchedule(name, None, 8, max_num_reqs=1)  # type: ignore[arg-type]
    plan(policy, [0], [5])
    policy.add_request(0, 0)
    assert commits(policy, [0], [13]) == [False]
    assert plan(policy, [0], [5]) == [(0, 0, 90)]


def test_block_causal_prefills_a_new_request_behind_what_it_finds() -> None:
    policy = KvSchedule("block_causal", None, 4, max_num_reqs=3)
    policy.add_request(0, 16)
    policy.add_request(1, 0)
    policy.add_request(2, 8)
    assert commits(policy, [2, 0, 1], [8, 24, 0]) == [False] * 3
    assert plan(policy, [2, 0, 1], [8, 24, 0]) == [(0, 8, 8), (1, 16, 24), (2, 0, 0)]
    assert plan(policy, [2, 0, 1], [8, 24, 0]) == []


def test_block_causal_commits_the_block_before_once() -> None:
    policy = KvSchedule("block_causal", None, 4, max_num_reqs=2)
    plan(policy, [0, 1], [8, 24])
    assert commits(policy, [1, 0], [24, 12]) == [False, True]
    assert plan(policy, [1, 0], [24, 12]) == []
    assert commits(policy, [1, 0], [24, 12]) == [False, False]


def test_a_request_that_comes_back_is_prefilled_again() -> None:
    policy = KvSchedule("block_causal", None, 4, max_num_reqs=1)
    plan(policy, [0], [8])
    policy.add_request(0, 0)
    assert commits(policy, [0], [12]) == [False]
    assert plan(policy, [0], [12]) == [(0, 0, 12)]


def test_blocks_are_aligned_where_a_model_is_block_causal() -> None:
    known = torch.tensor([0, 3, 4, 11])
    causal = KvSchedule("block_causal", None, 4, max_num_reqs=1)
    assert causal.block_start(known).tolist() == [0, 0, 4, 8]
    assert causal.block_start(known.numpy()).tolist() == [0, 0, 4, 8]
    assert causal.visible_end(np.array([4, 8]), np.array([90, 91])).tolist() == [8, 12]
    bidirectional = KvSchedule("dual", None, 4, max_num_reqs=1)
    assert bidirectional.block_start(known) is known
    assert bidirectional.visible_end(np.array([4, 8]), np.array([90, 91])).tolist() == [90, 91]


@pytest.mark.parametrize(("name", "decides"), [("dual", True), ("prefix", False), ("block_causal", False)])
def test_only_plain_dual_decides_by_its_refresh(name: str, decides: bool) -> None:
    assert KvSchedule(name, None, 4, max_num_reqs=1).decides_step == decides  # type: ignore[arg-type]


def test_dual_that_refreshes_again_does_not_decide() -> None:
    assert not KvSchedule("dual", 2, 4, max_num_reqs=1).decides_step
