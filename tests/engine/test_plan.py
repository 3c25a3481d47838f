"""The plan of a step: its segments, what they see and store, and where each row's token is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dllm.engine.plan import Role, StepPlan, plan_step
from vllm_dllm.state.kv import KvSchedule

B = 4
ROW_LEN = 24


def planned(
    kv: KvSchedule, starts: list[int], drafts: list[int] | None = None, look_ahead_from: int | None = None
) -> StepPlan:
    """Plan a step of the requests 0, 1, ..."""
    block_start = np.array(starts, dtype=np.int64)
    seq_len = np.full(len(starts), ROW_LEN)
    for request in range(len(starts)):
        if request not in kv.known:
            kv.add(request, 0)
    step = kv.step(range(len(starts)), block_start, seq_len)
    for request, start in enumerate(starts):
        kv.note(request, start)
    return plan_step(
        step,
        block_start=block_start,
        seq_len=seq_len,
        num_drafts=np.array(drafts or [0] * len(starts)),
        block_length=B,
        is_causal=kv.is_causal,
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


def test_a_step_of_nobody_has_no_rows() -> None:
    plan = planned(KvSchedule("dual", None, B), [])
    assert (plan.num_reqs, plan.num_rows, plan.layout().num_nodes) == (0, 0, 0)
    assert not plan.is_long


@given(data=st.data(), name=st.sampled_from(["dual", "prefix", "block_causal"]), every=st.sampled_from([None, 1, 2]))
def test_every_step_is_whole(data: st.DataObject, name: str, every: int | None) -> None:
    """Whatever the step: nodes are blocks, context and own rows are disjoint, positions in the row, tokens in reach."""
    is_causal = name == "block_causal"
    kv = KvSchedule(name, every if name == "dual" else None, B)  # type: ignore[arg-type]
    starts = [B * data.draw(st.integers(0, 2)) for _ in range(data.draw(st.integers(1, 4)))]
    for _ in range(3):
        drafts = [data.draw(st.integers(0, 6)) for _ in starts]
        plan = planned(kv, starts, drafts, 5 if is_causal else None)
        own, context = np.stack([plan.begin, plan.end], 1), plan.context
        assert (context[:, 1] == own[:, 0]).all()
        assert (context[:, 2] == own[:, 1]).all()
        assert (own[:, 1] <= ROW_LEN).all()
        assert plan.num_rows == plan.first_row[-1] == plan.rows_of_requests.sum() == len(plan.position)
        rows = plan.rows()
        assert np.array_equal(np.sort(rows.node[rows.node >= 0]), np.arange(len(rows.head)))
        assert (rows.node[:, 0] >= 0).all()
        assert (plan.position[rows.head][:, 0] % B == plan.position[rows.head][:, -1] % B - B + 1).all()
        canvases = (plan.num_reqs * plan.num_nodes + plan.num_reqs * plan.has_look_ahead) * B
        assert (rows.source <= canvases).all()
        assert ((rows.source == canvases) == (plan.position >= (plan.block_start[rows.request] + B)))[
            np.isin(plan.role.repeat(plan.end - plan.begin), [Role.REFRESH])
        ].all()
        ended = data.draw(st.lists(st.booleans(), min_size=len(starts), max_size=len(starts)))
        starts = [min(start + B * end, ROW_LEN - 2 * B) for start, end in zip(starts, ended, strict=True)]


@pytest.mark.parametrize("role", Role)
def test_every_role_decides_or_stores(role: Role) -> None:
    one = np.zeros(1, dtype=np.int64)
    plan = StepPlan(B, one, one, one > 0, one, one + role, one, one + B, np.zeros((1, 4), dtype=np.int64))
    assert plan.decides[0] or plan.stores[0]
