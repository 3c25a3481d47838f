"""The plan of a step: its segments, what they see and store, and where each row's token is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dllm.engine.plan import Role, StepPlan, plan_step
from vllm_dllm.engine.plan_windows import plan_windows
from vllm_dllm.state.kv import KvSchedule
from vllm_dllm.state.windows import WindowSchedule

B = 4
ROW_LEN = 24


def planned(
    kv: KvSchedule, starts: list[int], drafts: list[int] | None = None, look_ahead_from: int | None = None
) -> StepPlan:
    """Plan a step of the requests 0, 1, ..., of which so many tokens are known as `starts` says."""
    block_start = kv.block_start(np.array(starts, dtype=np.int64))
    seq_len = np.full(len(starts), ROW_LEN)
    for request in range(len(starts)):
        if request not in kv.known:
            kv.add(request, 0)
    step = kv.step(range(len(starts)), np.array(starts, dtype=np.int64), seq_len)
    for request, start in enumerate(block_start.tolist()):
        kv.note(request, start)
    return plan_step(
        step,
        block_start=block_start,
        seq_len=seq_len,
        num_drafts=np.array(drafts or [0] * len(starts)),
        block_length=B,
        kv_policy=kv.name,
        look_ahead_from=look_ahead_from,
    )


def segments(plan: StepPlan) -> list[tuple[int, str, int, int]]:
    names = [Role(role).name for role in plan.role]
    return list(zip(plan.request.tolist(), names, plan.begin.tolist(), plan.end.tolist(), strict=True))


def test_a_block_begins_with_a_refresh_that_decides() -> None:
    plan = planned(KvSchedule("dual", None, B), [5, 9], [2, 2])
    assert segments(plan) == [(0, "REFRESH", 0, 24), (1, "REFRESH", 0, 24)]
    assert plan.context.tolist() == [[0, 0, 24, 24]] * 2
    assert plan.rows_of_requests.tolist() == [24, 24]
    assert plan.is_long
    rows = plan.rows()
    assert rows.head.tolist() == [[5, 6, 7, 8], [33, 34, 35, 36]]
    assert rows.is_left_fresh.all()
    assert rows.is_stored.all()
    known, mask = [-1] * 5, [2 * B] * 15  # one node each, two requests
    assert rows.source[:24].tolist() == [*known, 0, 1, 2, 3, *mask]


def test_drafts_of_each_request_see_all_but_the_block() -> None:
    kv = KvSchedule("dual", None, B)
    planned(kv, [5, 9])
    plan = planned(kv, [5, 9], [2, 0])
    assert segments(plan) == [(0, "ROOT", 5, 9), (0, "DRAFT", 5, 9), (0, "DRAFT", 5, 9), (1, "ROOT", 9, 13)]
    assert plan.context.tolist() == [[0, 5, 9, 24]] * 3 + [[0, 9, 13, 24]]
    assert not plan.is_long
    assert not plan.is_plain
    assert not plan.stores.any()
    rows = plan.rows()
    assert rows.node.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert rows.source.tolist() == [*range(12), *range(12, 16)]
    assert plan.position.tolist() == [5, 6, 7, 8] * 3 + [9, 10, 11, 12]
    assert planned(kv, [5, 9], [1, 1]).is_plain


def test_a_step_that_refreshes_again_evaluates_drafts_too() -> None:
    kv = KvSchedule("prefix", None, B)
    planned(kv, [5])
    plan = planned(kv, [5], [2])
    assert segments(plan) == [(0, "REFRESH", 5, 24), (0, "DRAFT", 5, 9), (0, "DRAFT", 5, 9)]
    assert plan.context.tolist() == [[0, 5, 24, 24], [0, 5, 9, 24], [0, 5, 9, 24]]
    assert not plan.rows().is_left_fresh.any()
    assert plan.rows().is_stored.tolist() == [True] * 19 + [False] * 8
    assert plan.rows().node.tolist() == [[0, 1, 2]]


def test_a_prompt_is_stored_by_the_step_that_decides_the_first_block() -> None:
    kv = KvSchedule("block_causal", None, B)
    kv.add(0, 4)
    plan = planned(kv, [12, 0], [3, 3])
    assert segments(plan) == [(0, "PREFILL", 4, 8), (0, "PREFILL", 8, 12), (0, "ROOT", 12, 16), (1, "ROOT", 0, 4)]
    assert plan.context.tolist() == [[0, 4, 8, 8], [0, 8, 12, 12], [0, 12, 16, 16], [0, 0, 4, 4]]
    assert plan.layout().first_node.tolist() == [0, 3, 4]
    assert plan.rows().source.tolist() == [*[-1] * 8, *range(8)]


def test_commits_and_look_aheads_store_a_block() -> None:
    kv = KvSchedule("block_causal", None, B)
    planned(kv, [4, 4, 4])
    plan = planned(kv, [4, 8, 4], [5, 5, 4], look_ahead_from=5)
    first = [(0, "END", 4, 8), (0, "ROOT", 4, 8), *[(0, "DRAFT", 4, 8)] * 3, (0, "NEXT_ROOT", 8, 12)]
    assert segments(plan) == [
        *first,
        (1, "ROOT", 8, 12),
        (1, "COMMIT", 4, 8),
        (2, "ROOT", 4, 8),
        *[(2, "DRAFT", 4, 8)] * 4,
    ]
    assert plan.context[5].tolist() == [0, 8, 12, 12]
    assert plan.context[7].tolist() == [0, 4, 8, 8]
    rows = plan.rows()
    assert rows.node.tolist() == [[0, 1, 2, 3, -1, 4], [5, -1, -1, -1, -1, -1], [6, 7, 8, 9, 10, -1]]
    num_canvases = 3 * 6 * B
    assert rows.source[:B].tolist() == list(range(num_canvases, num_canvases + B))  # the end of request 0
    assert rows.source[5 * B : 6 * B].tolist() == list(range(5 * B, 6 * B))  # its next root, the last node
    assert rows.source[7 * B : 8 * B].tolist() == [-1] * B  # what request 1 commits
    assert rows.is_stored.reshape(-1, B).all(1).tolist() == [True] + [False] * 6 + [True] + [False] * 5


def test_a_block_begins_with_what_is_stored_whose_last_row_decides_its_first_position() -> None:
    """Nemotron: one causal segment of the prompt, then blocks behind it, the last of which ends with the row."""
    kv = KvSchedule("causal", None, B, stores_alone=True)
    kv.add(0, 4)
    plan = planned(kv, [10, 7], [3, 3])
    assert segments(plan) == [(0, "PREFILL", 4, 10), (1, "PREFILL", 0, 7)]
    assert plan.layout().is_causal.tolist() == [1, 1]
    assert plan.context.tolist() == [[0, 4, 10, 10], [0, 0, 7, 7]]
    rows = plan.rows()
    assert (rows.head.tolist(), rows.node.tolist()) == ([[5] * B, [12] * B], [[0], [1]])
    assert (set(rows.source.tolist()), rows.is_stored.all(), plan.is_long) == ({-1}, True, True)
    plan = planned(kv, [10, 7], [3, 3])
    assert segments(plan) == [(0, "ROOT", 10, 14), (1, "ROOT", 7, 11)], "nothing of the blocks is known yet"
    assert segments(planned(kv, [10, 7], [1, 0])) == [(0, "ROOT", 10, 14), (0, "DRAFT", 10, 14), (1, "ROOT", 7, 11)]
    plan = planned(kv, [14, 7], [3, 0])
    assert segments(plan) == [(0, "COMMIT", 10, 14), (1, "ROOT", 7, 11)]
    assert plan.layout().is_causal.tolist() == [1, 0]
    assert plan.rows().head.tolist() == [[3] * B, [4, 5, 6, 7]]
    assert (plan.num_stored.tolist(), plan.is_long, plan.is_plain) == ([B, 0], False, False)
    kv = KvSchedule("causal", None, B, stores_alone=True)
    planned(kv, [22])
    plan = planned(kv, [22])
    assert segments(plan) == [(0, "ROOT", 22, ROW_LEN)]
    assert (plan.rows().head.tolist(), plan.is_long, plan.is_plain) == ([[0, 1, 1, 1]], True, False)


def test_a_step_behind_a_short_reply_stores_no_position_before_the_first() -> None:
    """With async scheduling a step is under way when the reply's last block, a short one, turns out to be finished."""
    kv = KvSchedule("causal", None, 32, stores_alone=True)
    kv.add(0, 0)
    kv.note(0, 3)
    known = np.array([8])
    step = kv.step([0], known, known)
    plan = plan_step(step, block_start=known, seq_len=known, num_drafts=known * 0, block_length=32, kv_policy="causal")
    assert segments(plan) == [(0, "COMMIT", 0, 8)]
    assert plan.context.tolist() == [[0, 0, 8, 8]]


def test_a_first_position_that_the_prompt_has_is_not_decided() -> None:
    """Fast-dLLM v2: a partial block begins with its prefill; rows predict what is right of them."""
    kv = KvSchedule("block_causal", None, B, stores_alone=True)
    plan = planned(kv, [10, 8])
    prefills = [(0, "PREFILL", 0, 4), (0, "PREFILL", 4, 8)]
    assert segments(plan) == [*prefills, (0, "ROOT", 8, 12), (1, *prefills[0][1:]), (1, *prefills[1][1:])]
    assert not plan.layout().is_causal.any()
    rows = plan.rows(logit_shift=True)
    assert rows.head.tolist() == [[7, 8, 9, 10], [19] * B]
    assert rows.node.tolist() == [[0], [1]]


def test_windows_are_drafted_without_causality_and_verified_with_it() -> None:
    """A new request behind a cache hit, one that drafts, one that verifies a window of three."""
    schedule = WindowSchedule(B)
    for name, hit in (("new", 4), ("drafts", 0), ("verifies", 0)):
        schedule.add(name, hit)
    for name, stored in (("drafts", 20), ("verifies", 30), ("verifies", 30)):
        schedule.note(name, stored)
    names, known = ["new", "drafts", "verifies"], np.array([10, 21, 31])
    end = np.array([90, 90, 34])
    start, length = schedule.block_start(known), schedule.lengths(names, known, end)
    plan = plan_windows(schedule.step(names, known, end), start=start, length=length, block_length=B)
    assert segments(plan) == [
        *((0, "PREFILL", 4, 9), (0, "VERIFY", 9, 10)),
        *((1, "ROOT", 20, 24), (2, "VERIFY", 30, 33)),
    ]
    assert plan.context.tolist() == [[0, begin, end, end] for _, _, begin, end in segments(plan)]
    assert plan.layout().is_causal.tolist() == [1, 1, 0, 1]
    assert plan.num_stored.tolist() == [6, 0, 3]
    rows = plan.rows()
    assert rows.head.tolist() == [[5] * B, [6, 7, 8, 9], [10, 11, 12, 12]]
    assert rows.source.tolist() == [*[-1] * 5, 0, 4, 5, 6, 7, 8, 9, 10]
    assert rows.is_stored.tolist() == [*[True] * 6, *[False] * 4, *[True] * 3]
    assert not plan.is_plain


def test_a_step_of_nobody_has_no_rows() -> None:
    plan = planned(KvSchedule("dual", None, B), [])
    assert (plan.num_reqs, plan.num_rows, plan.layout().num_nodes) == (0, 0, 0)
    assert not plan.is_long


@given(
    data=st.data(),
    name=st.sampled_from(["dual", "prefix", "block_causal", "causal"]),
    every=st.sampled_from([None, 1, 2]),
    stores_alone=st.booleans(),
)
def test_every_step_is_whole(data: st.DataObject, name: str, every: int | None, stores_alone: bool) -> None:
    """Whatever the step: nodes are blocks, context and own rows are disjoint, positions in the row, tokens in reach."""
    is_causal = name in ("block_causal", "causal")
    stores_alone &= is_causal
    kv = KvSchedule(name, every if name == "dual" else None, B, stores_alone=stores_alone)  # type: ignore[arg-type]
    starts = [B * data.draw(st.integers(int(stores_alone), 2)) for _ in range(data.draw(st.integers(1, 4)))]
    for _ in range(3):
        drafts = [data.draw(st.integers(0, 6)) for _ in starts]
        plan = planned(kv, starts, drafts, 5 if is_causal and not stores_alone else None)
        own, context = np.stack([plan.begin, plan.end], 1), plan.context
        assert (context[:, 1] == own[:, 0]).all()
        assert (context[:, 2] == own[:, 1]).all()
        assert (own[:, 1] <= ROW_LEN).all()
        assert plan.num_rows == plan.first_row[-1] == plan.rows_of_requests.sum() == len(plan.position)
        rows = plan.rows()
        assert np.array_equal(np.sort(rows.node[rows.node >= 0]), np.arange(len(rows.head)))
        assert (rows.node[:, 0] >= 0).all()
        of_block = rows.head[~plan.decides_first[plan.decides]]
        assert (plan.position[of_block][:, 0] % B == plan.position[of_block][:, -1] % B - B + 1).all()
        assert plan.decides_first.sum() == (0 if plan.stores_alone is None else plan.stores_alone.sum())
        canvases = (plan.num_reqs * plan.num_nodes + plan.num_reqs * plan.has_look_ahead) * B
        assert (rows.source <= canvases).all()
        assert ((rows.source == canvases) == (plan.position >= (plan.block_start[rows.request] + B)))[
            np.isin(plan.role.repeat(plan.end - plan.begin), [Role.REFRESH])
        ].all()
        ended = data.draw(st.lists(st.booleans(), min_size=len(starts), max_size=len(starts)))
        starts = [min(start + B * end, ROW_LEN - 2 * B) for start, end in zip(starts, ended, strict=True)]


@pytest.mark.parametrize("role", Role)
def test_every_role_decides_stores_or_guides(role: Role) -> None:
    one = np.zeros(1, dtype=np.int64)
    plan = StepPlan(B, one, one, one > 0, one, one + role, one, one + B, np.zeros((1, 4), dtype=np.int64))
    assert plan.decides[0] or plan.stores[0] or role == Role.TWIN
