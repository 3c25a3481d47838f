"""Windows that slide: what a step stores, in which order its rows are, what is unmasked and what comes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dllm.config import DllmConfig
from vllm_dllm.reference.wedlm import WindowRule
from vllm_dllm.state.report import Column
from vllm_dllm.state.settle import Ledger
from vllm_dllm.state.sliding import (
    SlidingSchedule,
    penalised_entropy,
    physical_order,
    reorder,
    slide,
    unmasked_in_windows,
)
from vllm_dllm.state.step_rows import RowPlan
from vllm_dllm.state.windows import make_schedule
from vllm_dllm.unmask.walk import Nodes
from vllm_dllm.unmask.windows import WalkedWindows

M, W = 3, 8


def test_a_step_stores_what_the_step_before_made_final() -> None:
    schedule = make_schedule(DllmConfig(kv_policy="window", block_length=W), stores_alone=False)
    assert isinstance(schedule, SlidingSchedule)
    schedule.add("a", 16)
    step = schedule.step(["a"], np.array([20]), np.array([90]))
    assert (step.begin[0], step.end[0], step.is_new[0], step.is_short[0]) == (16, 20, True, False)
    schedule.note("a", 20)
    step = schedule.step(["a"], np.array([23]), np.array([90]))
    assert (step.begin[0], step.end[0], step.is_new[0]) == (20, 23, False)
    assert schedule.num_unstored(["a"], np.array([23])).tolist() == [3]
    assert step.is_long.tolist() == [True]
    schedule.note("a", 23)
    step = schedule.step(["a"], np.array([23]), np.array([28]))
    assert (step.begin[0], step.end[0], step.is_short[0], step.is_undrafted[0]) == (23, 23, True, True)
    assert schedule.lengths(["a"], np.array([23]), np.array([28])).tolist() == [5]
    schedule.add("a", 0)  # preempted: what it knows is its prompt
    assert schedule.step(["a"], np.array([23]), np.array([90])).begin.tolist() == [0]
    schedule.forget("a")
    assert not schedule.known


@pytest.mark.parametrize(
    ("canvas", "length", "order"),
    [
        ([M] * 8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([M, 9, M, 8, 7, M, M, M], 8, [1, 3, 4, 0, 2, 5, 6, 7]),
        ([M, 9, M, 8, 7, M, M, M], 4, [1, 3, 0, 2, 4, 5, 6, 7]),
        ([5, 5, 5, 5, 5, 5, 5, M], 7, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([M, 5, 5, 5, 5, 5, 5, 5], 1, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_known_tokens_come_first(canvas: list[int], length: int, order: list[int]) -> None:
    assert physical_order(torch.tensor([canvas]), torch.tensor([length]), M).tolist() == [order]


def test_rows_and_what_predicts_a_position_are_put_in_order() -> None:
    """A request stores two tokens before its window; another has a window of five positions."""
    order = torch.tensor([[1, 3, 4, 0, 2, 5, 6, 7], [2, 0, 1, 3, 4, 5, 6, 7]])
    plan = RowPlan(
        request=torch.tensor([0] * 10 + [1] * 5),
        source=torch.tensor([-1, -1, *range(8), *range(8, 13)]),
        position=torch.tensor([18, 19, *range(20, 28), *range(40, 45)]),
        is_stored=torch.tensor([1, 1, *[0] * 13]),
    )
    head = torch.tensor([[*range(2, 10)], [10, 11, 12, 13, 14, 14, 14, 14]])
    rows, own = reorder(plan, head, order, torch.tensor([[0], [1]]))
    assert rows.position.tolist() == [18, 19, 21, 23, 24, 20, 22, 25, 26, 27, 42, 40, 41, 43, 44]
    assert rows.source.tolist() == [-1, -1, 1, 3, 4, 0, 2, 5, 6, 7, 10, 8, 9, 11, 12]
    positions = rows.position[own]
    assert positions[0].tolist() == [*range(20, 28)], "the row of each position"
    assert positions[1, :5].tolist() == [*range(40, 45)]
    assert own[1, 5:].tolist() == [14] * 3, "of no position, but a row of the request"


def test_rows_of_drafts_are_those_of_their_states() -> None:
    """Of two requests the second has a draft; each evaluated canvas has an order of its own."""
    plan = RowPlan(
        request=torch.tensor([0] * 2 + [1] * 5),
        source=torch.tensor([0, 1, 8, 9, 12, 13, 14]),
        position=torch.tensor([50, 51, 20, 21, 20, 21, 22]),
        is_stored=torch.zeros(7, dtype=torch.int64),
    )
    head = torch.tensor([[0, 1, 1, 1], [2, 3, 3, 3], [4, 5, 6, 6]])
    order = torch.tensor([[1, 0, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3]])
    rows, own = reorder(plan, head, order, torch.tensor([[0, -1], [1, 2]]))
    assert rows.position.tolist() == [51, 50, 20, 21, 20, 22, 21]
    assert rows.source.tolist() == [1, 0, 8, 9, 12, 14, 13]
    assert own[:, :2].tolist() == [[1, 0], [2, 3], [4, 6]]


@given(data=st.data())
def test_what_is_unmasked_is_the_references(data: st.DataObject) -> None:
    is_masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=W, max_size=W).filter(any)))
    # few values, so that there are ties; two tokens
    probs = torch.tensor(data.draw(st.lists(st.sampled_from([0.5, 0.2, 0.1, 1e-3]), min_size=W, max_size=W)))
    logits = torch.stack([probs, 1 - probs], 1).double().log()
    bound, penalty = data.draw(st.sampled_from([1e-9, 0.3, 0.4, 0.6])), data.draw(st.sampled_from([0.0, 0.02, 0.3]))
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    penalised = penalised_entropy(entropy[None], is_masked[None], torch.tensor([penalty]).double())
    found = unmasked_in_windows(penalised, torch.tensor([bound]).double())[0]
    positions = 30 + is_masked.nonzero().squeeze(-1)
    expected = positions[WindowRule(bound, penalty).unmasks(logits[is_masked], positions)]
    assert (30 + found.nonzero().squeeze(-1)).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("canvas", "length", "num", "behind"),
    [
        ([10, 11, M, 13, M, M, M, M], 8, 2, [M, 13, M, M, M, M, M, M]),
        ([M, 11, M, M, M, M, M, M], 8, 0, [M, 11, M, M, M, M, M, M]),
        ([10, 11, 12, 13, 14, 15, 16, 17], 8, 8, [M] * 8),
        ([10, 11, 12, 0, 0, 0, 0, 0], 3, 3, [M] * 8),  # what is behind the row's end is no token
    ],
)
def test_what_is_known_at_the_front_is_emitted(canvas: list[int], length: int, num: int, behind: list[int]) -> None:
    before = torch.tensor([[M, M, M, M, M, M, M, M]])
    before[0, length:] = torch.tensor(canvas[length:])
    one = torch.tensor([20])
    ledger = Ledger(2, one, torch.tensor([length]), torch.tensor([[0], [0], [4]]))
    walked = WalkedWindows(torch.tensor([canvas]), torch.tensor([0]), torch.tensor([0]))
    window, emitted = slide(Nodes.of_roots(before, M), walked, one, ledger, M)
    assert window.tolist() == [behind]
    assert emitted.sampled[0, :num].tolist() == canvas[:num]
    assert (emitted.num_sampled.tolist(), emitted.num_rejected.tolist()) == ([num, 0], [length - num, 0])
    report = emitted.report[0]
    unmasked = sum(token != M for token in canvas[:length])
    columns = (Column.STORED, Column.WROTE, Column.UNMASKED, Column.FINISHED, Column.FORWARDS)
    assert [int(report[column]) for column in columns] == [20, 4, unmasked, int(num > 0), 1]
    assert emitted.report[1].eq(0).all()


def test_a_step_with_drafts_emits_up_to_two_windows() -> None:
    """What came true beyond the first window is emitted, too; the report tells drafts by their depth."""
    root = torch.tensor([[M, 11, M, M, M, M], [M, M, M, M, M, M]])
    after = torch.tensor([[10, 11, 12, 13, M, 15], [M, M, 22, M, M, M]])
    nodes = Nodes.of_roots(root, M).with_drafts(
        torch.stack([after] * 2, 1), torch.tensor([[True, True], [True, False]]), torch.tensor([[1, 2]] * 2), M
    )
    start, counted = torch.tensor([20, 40]), torch.tensor([6, 3])
    walked = WalkedWindows(after, torch.tensor([2, 0]), torch.tensor([2, 0]))
    behind, emitted = slide(nodes, walked, start, Ledger(2, start, counted), M)
    assert behind[:, :3].tolist() == [[M, 15, M], [M, M, 22]]
    assert (emitted.num_sampled.tolist(), emitted.num_rejected.tolist()) == ([4, 0], [2, 3])
    assert emitted.report[:, Column.ACCEPTED].tolist() == [2, 0]
    assert emitted.report[:, Column.PROPOSED : Column.PROPOSED + 3].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert emitted.report[:, Column.UNMASKED].tolist() == [4, 1]
