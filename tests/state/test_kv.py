"""What each KV policy stores, step by step."""

import numpy as np
import pytest

from vllm_dllm.engine.report import StepOrder
from vllm_dllm.state.kv import KvSchedule, KvStep

ROW_LEN = 90


def step(policy: KvSchedule, requests: list[int], starts: list[int]) -> KvStep:
    """Take a step; requests that are not known yet are new, and find nothing in the cache."""
    for request in requests:
        if request not in policy.known:
            policy.add(request, 0)
    made = policy.step(requests, np.array(starts), np.full(len(requests), ROW_LEN) + np.array(requests))
    for request, start in zip(requests, starts, strict=True):
        policy.note(request, start)
    return made


def stored(policy: KvSchedule, slots: list[int], starts: list[int]) -> list[tuple[int, int]]:
    """Return what a step refreshes or prefills of each request."""
    made = step(policy, slots, starts)
    return list(zip(made.begin.tolist(), made.end.tolist(), strict=True))


def test_dual_refreshes_when_a_block_begins() -> None:
    policy = KvSchedule("dual", None, 8)
    assert stored(policy, [2, 0], [10, 7]) == [(0, 92), (0, 90)]
    assert stored(policy, [0, 2], [7, 10]) == [(0, 0), (0, 0)]
    assert stored(policy, [0, 2], [7, 18]) == [(0, 0), (0, 92)]


def test_refresh_every_counts_from_the_blocks_begin() -> None:
    policy = KvSchedule("dual", 3, 8)
    ends = [stored(policy, [0], [start])[0][1] for start in [5] * 4 + [13] * 5]
    assert ends == [90, 0, 0, 90, 90, 0, 0, 90, 0]


def test_refresh_every_one_refreshes_always() -> None:
    policy = KvSchedule("dual", 1, 8)
    assert [stored(policy, [0], [5]) for _ in range(3)] == [[(0, 90)]] * 3


def test_prefix_recomputes_what_follows_at_every_step() -> None:
    policy = KvSchedule("prefix", None, 2)
    assert stored(policy, [0, 1], [4, 6]) == [(0, 90), (0, 91)]
    assert stored(policy, [0, 1], [4, 14]) == [(4, 90), (0, 91)]


def test_prefix_stores_nothing_of_the_last_block_but_when_it_begins() -> None:
    """No step refreshes a block alone: it would have the shape of a captured graph, which stores nothing."""
    policy = KvSchedule("prefix", None, 2)
    assert stored(policy, [0], [86]) == [(0, 90)]
    assert stored(policy, [0], [86]) == [(86, 90)]
    assert stored(policy, [0], [88]) == [(0, 90)]
    assert stored(policy, [0], [88]) == [(88, 88)]


@pytest.mark.parametrize("name", ["dual", "prefix"])
def test_who_comes_back_begins_a_block_at_the_same_position(name: str) -> None:
    policy = KvSchedule(name, None, 8)  # type: ignore[arg-type]
    step(policy, [0], [5])
    policy.add(0, 0)
    made = step(policy, [0], [5])
    assert (made.begin.tolist(), made.end.tolist(), made.is_new.tolist()) == ([0], [90], [True])
    assert made.commits.tolist() == [False]


def test_block_causal_prefills_a_new_request_behind_what_it_finds() -> None:
    policy = KvSchedule("block_causal", None, 4)
    policy.add(0, 16)
    policy.add(1, 0)
    policy.add(2, 8)
    made = step(policy, [2, 0, 1], [8, 24, 0])
    assert list(zip(made.begin.tolist(), made.end.tolist(), strict=True)) == [(8, 8), (16, 24), (0, 0)]
    assert made.commits.tolist() == [False] * 3
    assert made.is_new.tolist() == made.is_undrafted.tolist() == [True] * 3
    again = step(policy, [2, 0, 1], [8, 24, 0])
    assert (again.end == again.begin).all()
    assert not again.is_new.any()
    assert not again.is_undrafted.any()


def test_block_causal_commits_the_block_before_once() -> None:
    policy = KvSchedule("block_causal", None, 4)
    step(policy, [0, 1], [8, 24])
    made = step(policy, [1, 0], [24, 12])
    assert made.commits.tolist() == made.is_undrafted.tolist() == [False, True]
    assert (made.end == made.begin).all()
    assert step(policy, [1, 0], [24, 12]).commits.tolist() == [False, False]


def test_a_block_that_a_look_ahead_stored_is_not_committed() -> None:
    policy = KvSchedule("block_causal", None, 4)
    step(policy, [0, 1], [8, 24])
    policy.note(1, 28)
    made = step(policy, [1, 0], [28, 12])
    assert made.commits.tolist() == made.is_undrafted.tolist() == [False, True]


def test_a_request_that_comes_back_is_prefilled_again() -> None:
    policy = KvSchedule("block_causal", None, 4)
    step(policy, [0], [8])
    policy.add(0, 0)
    made = step(policy, [0], [12])
    assert (made.begin.tolist(), made.end.tolist(), made.commits.tolist()) == ([0], [12], [False])


def test_blocks_are_aligned_where_a_model_is_block_causal() -> None:
    known = np.array([0, 3, 4, 11])
    causal = KvSchedule("block_causal", None, 4)
    assert causal.block_start(known).tolist() == [0, 0, 4, 8]
    assert KvSchedule("dual", None, 4).block_start(known) is known


def test_rows_are_those_of_what_is_stored_and_of_the_block() -> None:
    causal = KvSchedule("block_causal", None, 4)
    causal.add(0, 4)
    assert causal.num_rows(step(causal, [0, 1], [12, 0])).tolist() == [12, 4]
    made = step(causal, [0, 1], [16, 0])
    assert (causal.num_rows(made).tolist(), made.is_long.tolist()) == ([8, 4], [False, False])
    prefix = KvSchedule("prefix", None, 4)
    made = step(prefix, [0], [5])
    assert (prefix.num_rows(made).tolist(), made.is_long.tolist()) == ([90], [True])
    assert prefix.num_rows(step(prefix, [0], [5])).tolist() == [85]
    step(prefix, [0], [86])
    made = step(prefix, [0], [86])
    assert (prefix.num_rows(made).tolist(), made.is_long.tolist()) == ([4], [False])


def test_what_was_decided_is_read_in_any_order_and_of_those_alone_who_take_the_step() -> None:
    policy = KvSchedule("block_causal", None, 4)
    policy.add("b", 8)
    policy.add("a", 0)
    made = policy.step(["a", "b"], np.array([4, 12]), np.zeros(2, dtype=np.int64))
    sent = StepOrder(("a", "b"), made)
    for names in (["b"], ["b", "a"]):
        own = sent.kv_of(names)
        assert own is not None
        stored = {"a": (0, 4), "b": (8, 12)}
        assert list(zip(own.begin.tolist(), own.end.tolist(), strict=True)) == [stored[name] for name in names]
    assert StepOrder(("a", "b"), None).kv_of(["a"]) is None
    policy.forget("a")
    policy.forget("a")
    assert policy.known == {"b"}


def test_a_bidirectional_block_is_short_where_the_row_ends_in_it_and_not_behind() -> None:
    policy = KvSchedule("dual", None, 8)
    made = [step(policy, [0], [start]).is_short.tolist() for start in (74, 82, 83, 89, 90)]
    assert made == [[False], [False], [True], [True], [False]]  # a void step finds its block behind the row's end
