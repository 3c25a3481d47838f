"""What each KV policy stores, step by step."""

import numpy as np
import pytest

from vllm_dllm.state.kv import KvSchedule, KvStep

ROW_LEN = 90


def step(policy: KvSchedule, slots: list[int], starts: list[int]) -> KvStep:
    return policy.step(np.array(slots), np.array(starts), np.full(len(slots), ROW_LEN) + np.array(slots))


def stored(policy: KvSchedule, slots: list[int], starts: list[int]) -> list[tuple[int, int]]:
    """Return what a step refreshes or prefills of each request."""
    made = step(policy, slots, starts)
    return list(zip(made.begin.tolist(), made.end.tolist(), strict=True))


def test_dual_refreshes_when_a_block_begins() -> None:
    policy = KvSchedule("dual", None, 8, max_num_reqs=4)
    assert stored(policy, [2, 0], [10, 7]) == [(0, 92), (0, 90)]
    assert stored(policy, [0, 2], [7, 10]) == [(0, 0), (0, 0)]
    assert stored(policy, [0, 2], [7, 18]) == [(0, 0), (0, 92)]


def test_refresh_every_counts_from_the_blocks_begin() -> None:
    policy = KvSchedule("dual", 3, 8, max_num_reqs=1)
    ends = [stored(policy, [0], [start])[0][1] for start in [5] * 4 + [13] * 5]
    assert ends == [90, 0, 0, 90, 90, 0, 0, 90, 0]


def test_refresh_every_one_refreshes_always() -> None:
    policy = KvSchedule("dual", 1, 8, max_num_reqs=1)
    assert [stored(policy, [0], [5]) for _ in range(3)] == [[(0, 90)]] * 3


def test_prefix_recomputes_what_follows_at_every_step() -> None:
    policy = KvSchedule("prefix", None, 2, max_num_reqs=2)
    assert stored(policy, [0, 1], [4, 6]) == [(0, 90), (0, 91)]
    assert stored(policy, [0, 1], [4, 14]) == [(4, 90), (0, 91)]


def test_prefix_stores_nothing_of_the_last_block_but_when_it_begins() -> None:
    """No step refreshes a block alone: it would have the shape of a captured graph, which stores nothing."""
    policy = KvSchedule("prefix", None, 2, max_num_reqs=1)
    assert stored(policy, [0], [86]) == [(0, 90)]
    assert stored(policy, [0], [86]) == [(86, 90)]
    assert stored(policy, [0], [88]) == [(0, 90)]
    assert stored(policy, [0], [88]) == [(88, 88)]


@pytest.mark.parametrize("name", ["dual", "prefix"])
def test_a_new_request_in_the_slot_begins_a_block_at_the_same_position(name: str) -> None:
    policy = KvSchedule(name, None, 8, max_num_reqs=1)  # type: ignore[arg-type]
    step(policy, [0], [5])
    policy.add_request(0, 0)
    made = step(policy, [0], [5])
    assert (made.begin.tolist(), made.end.tolist(), made.is_new.tolist()) == ([0], [90], [True])
    assert made.commits.tolist() == [False]


def test_block_causal_prefills_a_new_request_behind_what_it_finds() -> None:
    policy = KvSchedule("block_causal", None, 4, max_num_reqs=3)
    policy.add_request(0, 16)
    policy.add_request(1, 0)
    policy.add_request(2, 8)
    made = step(policy, [2, 0, 1], [8, 24, 0])
    assert list(zip(made.begin.tolist(), made.end.tolist(), strict=True)) == [(8, 8), (16, 24), (0, 0)]
    assert made.commits.tolist() == [False] * 3
    assert made.is_new.tolist() == made.begins_block.tolist() == [True] * 3
    again = step(policy, [2, 0, 1], [8, 24, 0])
    assert (again.end == again.begin).all()
    assert not again.is_new.any()
    assert not again.begins_block.any()


def test_block_causal_commits_the_block_before_once() -> None:
    policy = KvSchedule("block_causal", None, 4, max_num_reqs=2)
    step(policy, [0, 1], [8, 24])
    made = step(policy, [1, 0], [24, 12])
    assert made.commits.tolist() == made.begins_block.tolist() == [False, True]
    assert (made.end == made.begin).all()
    assert step(policy, [1, 0], [24, 12]).commits.tolist() == [False, False]


def test_a_block_that_a_look_ahead_stored_is_not_committed() -> None:
    policy = KvSchedule("block_causal", None, 4, max_num_reqs=3)
    step(policy, [0, 1, 2], [8, 24, 0])
    policy.add_request(2, 4)
    policy.came_over(np.array([1, 2]), np.array([24, 0]))
    made = step(policy, [1, 0, 2], [28, 12, 4])
    assert made.commits.tolist() == [False, True, False]
    assert made.is_new.tolist() == [False, False, True]


def test_a_request_that_comes_back_is_prefilled_again() -> None:
    policy = KvSchedule("block_causal", None, 4, max_num_reqs=1)
    step(policy, [0], [8])
    policy.add_request(0, 0)
    made = step(policy, [0], [12])
    assert (made.begin.tolist(), made.end.tolist(), made.commits.tolist()) == ([0], [12], [False])


def test_blocks_are_aligned_where_a_model_is_block_causal() -> None:
    known = np.array([0, 3, 4, 11])
    causal = KvSchedule("block_causal", None, 4, max_num_reqs=1)
    assert causal.block_start(known).tolist() == [0, 0, 4, 8]
    assert KvSchedule("dual", None, 4, max_num_reqs=1).block_start(known) is known
