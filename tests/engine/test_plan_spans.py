"""Plans of steps whose canvases have neighbours in flight."""

import numpy as np

from tests.engine.test_plan import ROW_LEN, B, planned, segments
from vllm_dllm.engine.plan import Role, plan_step
from vllm_dllm.state.kv import KvSchedule


def test_drafts_are_evaluated_with_all_that_follows_and_see_what_is_frozen() -> None:
    kv = KvSchedule("freecache", None, B)
    assert segments(planned(kv, [5], [2])) == [(0, "REFRESH", 0, ROW_LEN)]
    plan = planned(kv, [5], [2])
    assert segments(plan) == [(0, "ROOT", 5, 24), (0, "DRAFT", 5, 24), (0, "DRAFT", 5, 24)]
    assert plan.context.tolist() == [[0, 5, 24, 24]] * 3
    assert (plan.is_long, plan.stores.any(), plan.rows_of_requests.tolist()) == (True, False, [57])
    rows, masks = plan.rows(), [3 * B] * 15
    assert rows.source.tolist() == [*range(4), *masks, *range(4, 8), *masks, *range(8, 12), *masks]
    assert rows.head.tolist() == [[0, 1, 2, 3], [19, 20, 21, 22], [38, 39, 40, 41]]
    assert not rows.is_left_fresh.any()


def test_what_a_block_leaves_behind_is_stored_when_the_next_one_begins() -> None:
    kv = KvSchedule("freecache", None, B)
    planned(kv, [5])
    plan = planned(kv, [9], [2])
    assert segments(plan) == [(0, "REFRESH", 5, ROW_LEN)]
    assert plan.context.tolist() == [[0, 5, 24, 24]]
    rows = plan.rows()
    assert rows.source.tolist() == [-1] * 4 + [0, 1, 2, 3] + [B] * 11
    assert (rows.head.tolist(), rows.is_stored.all()) == ([[4, 5, 6, 7]], True)


def test_the_row_that_predicts_a_blocks_first_position_is_each_canvas_own() -> None:
    kv = KvSchedule("freecache", None, B, logit_shift=True)
    planned(kv, [5])
    plan = planned(kv, [5], [1])
    assert segments(plan) == [(0, "ROOT", 4, 24), (0, "DRAFT", 4, 24)]
    rows = plan.rows(logit_shift=True)
    assert (rows.head.tolist(), rows.is_left_fresh.tolist()) == ([[0, 1, 2, 3], [20, 21, 22, 23]], [True, True])
    assert rows.source[:5].tolist() == [-1, 0, 1, 2, 3]


def test_a_vicinity_sees_what_is_stored_on_both_sides() -> None:
    kv = KvSchedule("vicinity", None, B, vicinity=(3, 2, 0))
    planned(kv, [5, 17])
    plan = planned(kv, [5, 17], [1, 0])
    assert segments(plan) == [(0, "ROOT", 2, 11), (0, "DRAFT", 2, 11), (1, "ROOT", 14, 23)]
    assert plan.context.tolist() == [[0, 2, 11, 24]] * 2 + [[0, 14, 23, 24]]
    rows = plan.rows()
    assert rows.source[:9].tolist() == [-1] * 3 + [0, 1, 2, 3] + [4 * B] * 2
    assert np.array_equal(rows.node, [[0, 1], [2, -1]])


def test_rows_of_a_delayed_refresh_attend_to_what_is_stored_each_for_itself() -> None:
    kv = KvSchedule("dkv", 8, B)
    for _ in range(2):
        assert segments(planned(kv, [17, 5])) == [(0, "REFRESH", 0, ROW_LEN), (1, "REFRESH", 0, ROW_LEN)]
    plan = planned(kv, [17, 20])
    assert segments(plan) == [(0, "DELAYED", 17, ROW_LEN), (1, "REFRESH", 0, ROW_LEN)]
    layout = plan.layout()
    assert layout.first_node.tolist() == [0, 7, 8]
    assert layout.first_row.tolist() == [*range(8), 7 + ROW_LEN]
    assert layout.context[:7].tolist() == [[0, p, p + 1, ROW_LEN] for p in range(17, ROW_LEN)]
    assert layout.context[7].tolist() == [0, 0, ROW_LEN, ROW_LEN]
    rows = plan.rows()
    assert rows.head.tolist() == [[0, 1, 2, 3], [27, 28, 29, 30]]
    assert rows.is_stored.tolist() == [2] * 7 + [1] * ROW_LEN
    assert rows.source[:7].tolist() == [0, 1, 2, 3, 2 * B, 2 * B, 2 * B]
    assert (plan.num_stored.tolist(), plan.has(Role.REFRESH).tolist()) == ([7, ROW_LEN], [False, True])


def test_the_row_left_of_the_block_is_part_of_a_delayed_refresh() -> None:
    kv = KvSchedule("dkv", 8, B, logit_shift=True)
    planned(kv, [5])
    plan = planned(kv, [5])
    assert segments(plan) == [(0, "DELAYED", 4, ROW_LEN)]
    rows = plan.rows(logit_shift=True)
    assert (rows.head.tolist(), rows.is_left_fresh.tolist()) == ([[0, 1, 2, 3]], [True])


def test_each_canvas_of_a_guided_request_has_a_twin_without_its_prompt() -> None:
    kv = KvSchedule("dual", 1, B)
    planned(kv, [5, 13])
    step = kv.step(range(2), np.array([5, 13]), np.full(2, ROW_LEN))
    plan = plan_step(
        step,
        block_start=np.array([5, 13]),
        seq_len=np.full(2, ROW_LEN),
        num_drafts=np.array([0, 1]),
        block_length=B,
        kv_policy="dual",
        prompt_len=np.array([0, 9]),
    )
    names = [(1, name, 0, ROW_LEN) for name in ("REFRESH", "DRAFT", "TWIN", "TWIN")]
    assert segments(plan) == [(0, "REFRESH", 0, ROW_LEN), *names]
    assert plan.layout().context_len.tolist() == [0] * 5
    rows = plan.rows()
    canvas, mask = 2 * B, 4 * B  # of the second request's root; two nodes each
    tail = [mask] * 7
    assert rows.source[3 * ROW_LEN :].tolist() == [
        *([mask] * 9 + [-1] * 4 + [canvas, canvas + 1, canvas + 2, canvas + 3] + tail),
        *([mask] * 9 + [-1] * 4 + [canvas + 4, canvas + 5, canvas + 6, canvas + 7] + tail),
    ]
    assert rows.twin_of.tolist() == [1, 2]
    assert rows.twin_head.tolist() == [
        [3 * ROW_LEN + 13 + i for i in range(B)],
        [4 * ROW_LEN + 13 + i for i in range(B)],
    ]
    assert plan.rows(logit_shift=True).twin_head[0].tolist() == [3 * ROW_LEN + 12 + i for i in range(B)]
    assert rows.is_stored[: 2 * ROW_LEN].all()
    assert not rows.is_stored[2 * ROW_LEN :].any()
    assert plan.rows_of_requests.tolist() == [ROW_LEN, 4 * ROW_LEN]
