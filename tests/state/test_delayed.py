"""Which rows of a delayed refresh are stored: those of what was not known before the step before."""

import torch

from tests.state.test_canvas import MASK, blocks, request, state_of
from vllm_dllm.attention.layout import PagedIndex
from vllm_dllm.state.canvas import CanvasState
from vllm_dllm.state.delayed import IF_NEW, DelayedRows
from vllm_dllm.state.step_rows import RowPlan, torch_rows

START, END = 10, 18


def plan(first: int, mark: int) -> RowPlan:
    position = torch.arange(first, END)
    return RowPlan(torch.zeros_like(position), torch.zeros_like(position), position, torch.full_like(position, mark))


def rows_of(state: CanvasState) -> DelayedRows:
    made = DelayedRows.around(torch_rows, state, "dkv")
    assert isinstance(made, DelayedRows)
    return made


def stored(rows: DelayedRows, canvas: list[int], first: int, mark: int = IF_NEW) -> list[int]:
    """Return the positions that a step stores."""
    rows.state.canvas[0] = torch.tensor(canvas)
    found = rows.decided(blocks(0, start=START), plan(first, mark))
    return found.position[found.is_stored > 0].tolist()


def test_a_tokens_row_is_stored_once_more_behind_the_step_that_unmasked_it() -> None:
    rows = rows_of(state_of(request(seq_len=END)))
    assert stored(rows, [MASK] * 4, 0, 1) == list(range(END))
    assert stored(rows, [MASK, 7, MASK, MASK], START) == list(range(START, END)), "11 is known since the last step"
    assert stored(rows, [8, 7, MASK, MASK], START) == [10, 12, 13, *range(14, END)]
    assert stored(rows, [8, 7, MASK, 9], START) == [12, 13, *range(14, END)]
    assert stored(rows, [MASK, 7, MASK, 9], START) == [10, 12, *range(14, END)], "10 was masked again"
    assert stored(rows, [8, 7, 6, 9], 0, 1) == list(range(END)), "a refresh of all"


def test_with_a_shift_a_row_stays_once_what_it_predicts_is_known() -> None:
    params = request(seq_len=END)
    state = CanvasState(1, 4, MASK, torch.device("cpu"), left=torch.zeros(1, 2))
    state.add_request(0, params)
    state.apply_staged_writes()
    rows = rows_of(state)
    assert stored(rows, [MASK] * 4, 0, 1) == list(range(END))
    assert stored(rows, [MASK, 7, MASK, MASK], START - 1) == list(range(START - 1, END - 1)), (
        "the last predicts nothing"
    )
    assert stored(rows, [8, 7, MASK, MASK], START - 1) == [9, 11, 12, *range(13, END - 1)]
    assert stored(rows, [8, 7, MASK, 5], START - 1) == [11, 12, *range(13, END - 1)]


def test_other_policies_fill_rows_as_ever() -> None:
    def fill(*_: object) -> PagedIndex | None:
        return None

    assert DelayedRows.around(fill, state_of(request()), "dual") is fill
