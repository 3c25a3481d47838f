"""Windows of self-speculation: which step is next and how long, and what comes of a step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_dllm.config import DllmConfig
from vllm_dllm.reference.self_speculation import next_window
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.kv import KvSchedule, KvStep
from vllm_dllm.state.report import Column
from vllm_dllm.state.settle import Emission, Ledger
from vllm_dllm.state.windows import WindowSchedule, make_schedule, settle_windows

MASK, B = 3, 8


def step_of(schedule: WindowSchedule, known: int, end: int) -> tuple[KvStep, int]:
    """Return the only request's next step, and the length of its window."""
    given = ["a"], np.array([known]), np.array([end])
    return schedule.step(*given), int(schedule.lengths(*given)[0])


def test_a_request_verifies_its_prompt_then_drafts_and_verifies_in_turn() -> None:
    schedule = WindowSchedule(32)
    schedule.add("a", 16)
    step, length = step_of(schedule, 20, 90)
    assert (step.begin[0], step.end[0], length, step.is_new[0], step.stores_alone[0]) == (16, 20, 1, True, True)
    schedule.note("a", 20)
    step, length = step_of(schedule, 21, 90)
    assert (step.begin[0], step.end[0], length, step.stores_alone[0]) == (20, 20, 8, False)
    schedule.note("a", 20)
    step, length = step_of(schedule, 21, 90)
    assert (step.begin[0], step.end[0], length, step.stores_alone[0], step.is_new[0]) == (20, 28, 8, True, False)
    schedule.note("a", 28)  # all seven drafts, and the window's first token
    step, length = step_of(schedule, 29, 90)
    assert (step.begin[0], length, step.stores_alone[0]) == (28, 16, False)
    schedule.add("a", 0)  # preempted: what it knows is its prompt
    step, length = step_of(schedule, 29, 90)
    assert (step.begin[0], step.end[0], length, step.is_new[0]) == (0, 29, 1, True)
    schedule.forget("a")
    assert not schedule.known


def test_a_window_ends_with_the_row_and_one_token_needs_no_draft() -> None:
    schedule = WindowSchedule(32)
    schedule.add("a", 0)
    schedule.note("a", 20)
    assert step_of(schedule, 21, 25)[1] == 4
    step, length = step_of(schedule, 21, 22)
    assert (length, step.stores_alone[0], step.begin[0], step.end[0]) == (1, True, 20, 21)


@given(accepted=st.lists(st.floats(0, 1), max_size=30), most=st.sampled_from([1, 4, 8, 16, 32]))
def test_lengths_are_the_references_as_long_as_the_row_goes_on(accepted: list[float], most: int) -> None:
    schedule, known, end = WindowSchedule(most), 5, 150
    schedule.add("a", 0)
    schedule.note("a", known)
    known, window = known + 1, min(8, most)
    for share in accepted:
        step, length = step_of(schedule, known, end)
        assert length == min(window, end - known)
        if length > 1:
            assert not step.stores_alone[0]
            schedule.note("a", known - 1)
        assert step_of(schedule, known, end)[0].stores_alone[0]
        num = round(share * (length - 1))
        if length > 1:
            window = next_window(window, length - 1, num, most)
        schedule.note("a", known + num)
        known += num + 1
        if known == end:
            break


def test_other_modes_have_blocks() -> None:
    kind = type(make_schedule(DllmConfig(kv_policy="causal", mode="self_speculation"), stores_alone=True))
    assert kind is WindowSchedule
    assert type(make_schedule(DllmConfig(kv_policy="causal"), stores_alone=True)) is KvSchedule


def settled(canvas: list[int], tokens: list[int], length: int, *, verifies: bool) -> tuple[Tensor, Emission]:
    """Settle the step of a request whose window begins at 20, in a batch of two."""
    one = torch.tensor([20])
    planned = torch.tensor([[0], [0], [length * verifies]])
    ledger = Ledger(2, one + 1, torch.tensor([length]), planned, begun=torch.tensor([int(verifies)]))
    blocks = Blocks(torch.tensor([0]), np.array([0]), one)
    return settle_windows(torch.tensor([canvas]), torch.tensor([tokens]), blocks, ledger, MASK)


@pytest.mark.parametrize(
    ("tokens", "length", "num"),
    [
        ([11, 12, 13, 14, 15, 16, 17, 30], 8, 8),  # all drafts and the bonus token
        ([11, 12, 40, 14, 15, 16, 17, 30], 8, 3),  # what agrees behind the first that does not counts no more
        ([40, 12, 13, 14, 15, 16, 17, 30], 8, 1),
        ([11, 12, 13, 14, 14, 14, 14, 14], 4, 4),  # rows of the window end with the fourth
        ([40, 40, 40, 40, 40, 40, 40, 40], 1, 1),
    ],
)
def test_what_is_verified(tokens: list[int], length: int, num: int) -> None:
    canvas, emitted = settled([10, 11, 12, 13, 14, 15, 16, 17], tokens, length, verifies=True)
    assert emitted.sampled[0, :num].tolist() == tokens[:num]
    assert (emitted.num_sampled.tolist(), emitted.num_rejected.tolist()) == ([num, 0], [length - num, 0])
    assert canvas.tolist() == [[tokens[num - 1], *[MASK] * 7]]
    report = emitted.report[0]
    assert [int(report[c]) for c in (Column.STORED, Column.WROTE, Column.ACCEPTED, Column.UNMASKED)] == [
        *(20 + num, num, num - 1, num),
    ]
    assert (int(report[Column.FINISHED]), int(report[Column.PROPOSED :].sum())) == (1, length - 1)
    assert emitted.report[1].eq(0).all()


@pytest.mark.parametrize("length", [2, 5, 8])
def test_what_is_drafted_is_kept_and_not_emitted(length: int) -> None:
    tokens = [40, 11, 12, MASK, 14, 15, 16, 17]
    canvas, emitted = settled([10, *[MASK] * 7], tokens, length, verifies=False)
    assert canvas.tolist() == [[10, *tokens[1:length], *[MASK] * (8 - length)]]
    assert (emitted.num_sampled.tolist(), emitted.num_rejected.tolist()) == ([0, 0], [length, 0])
    report = emitted.report[0]
    assert (int(report[Column.STORED]), int(report[Column.FORWARDS]), int(report[Column.PROPOSED :].sum())) == (
        20,
        1,
        0,
    )
