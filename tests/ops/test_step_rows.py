"""`step_rows` equals `state.step_rows.torch_rows`, on each device, for plain steps and for the plans of all kinds."""

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops import simt
from vllm_dllm import ops
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.step_rows import NULL_PAGE, RowInputs, RowPlan, Sequences, native_rows, torch_rows
from vllm_dllm.unmask.walk import Nodes

MASK, MAX_LEN, PAGE_SIZE = 3, 96, 16
WHERE = ["cpu", simt.WHERE, pytest.param("cuda", marks=pytest.mark.gpu)]
Call = tuple[Nodes, Blocks, RowPlan | None, Sequences]


def random_call(num_reqs: int, seed: int, *, is_plain: bool, looks_ahead: bool, stores: bool) -> Call:
    """Draw a step; the tables have more rows and columns than it needs, and lie in larger ones."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    num_nodes, block_length = 1 + seed % 4, 1 + seed % 9
    canvas = whole(0, 60, num_reqs, num_nodes, block_length)
    end = whole(60, 90, num_reqs, block_length) if looks_ahead else None
    nodes = Nodes(canvas, canvas == MASK, canvas[..., 0] >= 0, canvas[..., 0] * 0, end)
    slots = torch.randperm(num_reqs + 2, generator=generator)[:num_reqs]
    blocks = Blocks(slots, slots.numpy(), whole(0, 50, num_reqs))
    token_ids = whole(100, 200, num_reqs + 2, MAX_LEN + 5).int()[:, :MAX_LEN]
    pages = whole(1, 500, num_reqs + 1, 2 * MAX_LEN // PAGE_SIZE).int()[:, : MAX_LEN // PAGE_SIZE]
    known = Sequences(token_ids, pages, PAGE_SIZE) if stores else Sequences(token_ids)
    if is_plain:
        return nodes, blocks, None, known
    num_rows = 40 if num_reqs else 0
    num_sources = canvas.numel() + (0 if end is None else end.numel()) + 1
    plan = (
        whole(0, max(num_reqs, 1), num_rows),
        whole(-(num_sources // 3) - 1, num_sources, num_rows),
        whole(0, MAX_LEN, num_rows),
        whole(0, 2, num_rows),
    )
    return nodes, blocks, RowPlan(*plan), known


def moved(value: Any, where: str) -> Any:
    """Return a value with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to("cuda" if where == "cuda" else "cpu")
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), where) for field in fields(value)})
    return value


def filled(call: Call, way: Any, where: str = "cpu") -> list[Tensor]:
    """Return what a way writes and returns, behind what it must not touch."""
    nodes, _, plan, _ = call
    num_rows = nodes.canvas.numel() if plan is None else len(plan.request)
    buffers = RowInputs(torch.full((num_rows + 2,), 77, dtype=torch.int32), torch.full((num_rows + 2,), 78))
    buffers = moved(buffers, where)
    into = RowInputs(buffers.input_ids[:num_rows], buffers.positions[:num_rows])
    places = way(*(moved(each, where) for each in call), into, MASK)
    return [
        each.cpu() for each in (buffers.input_ids, buffers.positions, *([places.page, places.offset] if places else []))
    ]


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "simt":
        monkeypatch.setattr(ops, "step_rows", lambda *args: simt.ops().step_rows(*args))
    return str(request.param)


@pytest.mark.parametrize("num_reqs", [0, 1, 5])
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "planned"])
def test_equals_the_torch_twin(num_reqs: int, is_plain: bool, where: str) -> None:
    kinds = set()
    for seed in range(12):
        call = random_call(num_reqs, seed, is_plain=is_plain, looks_ahead=seed % 2 == 0, stores=seed % 3 > 0)
        expected = filled(call, torch_rows)
        found = filled(call, native_rows, where)
        assert len(found) == len(expected) == (4 if not is_plain and seed % 3 else 2)
        assert all(map(torch.equal, found, expected))
        assert expected[0][-2:].tolist() == [77, 77]
        kinds |= set(np.digitize(expected[0][:-2], [3, 4, 60, 90, 100, 200]).tolist())
    if num_reqs and not is_plain:
        assert kinds == {0, 1, 2, 3, 5}, "tokens, masks, ends and known tokens all occur"


def test_rows_that_are_not_stored_go_to_nobodys_page() -> None:
    call = random_call(5, 1, is_plain=False, looks_ahead=False, stores=True)
    page = filled(call, native_rows)[2]
    assert call[2] is not None
    assert (page == NULL_PAGE).tolist() == (call[2].is_stored == 0).tolist()


def arguments(*, is_plain: bool = False) -> list[Any]:
    """The op's arguments."""
    nodes, blocks, plan, known = random_call(5, 7, is_plain=is_plain, looks_ahead=True, stores=True)
    planned = [] if plan is None else [getattr(plan, field.name) for field in fields(plan)]
    num_rows = nodes.canvas.numel() if plan is None else len(plan.request)
    into = [torch.zeros(num_rows, dtype=torch.int32), torch.zeros(num_rows, dtype=torch.int64)]
    requests = [blocks.slots, blocks.start]
    tables = [known.token_ids, known.pages, known.page_size]
    return [nodes.canvas, nodes.end, requests, planned, *tables, into, MASK, NULL_PAGE]


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "planned"])
def test_opcheck(is_plain: bool) -> None:
    """It is in no compiled graph: torch cannot trace what both writes to a list and returns one."""
    call = arguments(is_plain=is_plain)
    ops.step_rows(*call)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vllm_dllm.step_rows.default, tuple(call), test_utils=checks)


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "canvas": ((0, lambda t: t[0]), "canvas must be [num_reqs, num_canvases, block_length], got [4, 8]; give the root"),
    "end": ((1, lambda t: t[1:]), "end must be [5, 8], got [4, 8]; sizes follow from canvas and into.input_ids"),
    "requests": ((2, slice(1)), "requests must be 2 tensors, got 1; give slots and start"),
    "slots": ((2, 0, lambda t: t + 99), "allowed are 0..6; give the slots of the requests"),
    "plan": ((3, slice(3)), "plan must be 0 or 4 tensors, got 3; give request, source, position and is_stored"),
    "no plan": ((3, slice(0)), "into.input_ids must have 160 rows without a plan, got 40; give one for each token"),
    "request": ((3, 0, lambda t: t + 5), "allowed are 0..4, up to 200 and 0 or more; give those of the step"),
    "source": ((3, 1, lambda t: t + 999), "allowed are 0..4, up to 200 and 0 or more; give those of the step"),
    "known": ((4, lambda t: t.long()), "known must be Int, got Long; convert it with .to()"),
    "short": ((4, lambda t: t[:, :1]), "takes the token at "),
    "pages": ((5, lambda t: t[:3]), "pages must be [5 or more, n], got [3, 6]; give a row for each"),
    "few": ((5, lambda t: t[:, :1]), "in pages of 16, the table has 1; give those of the step"),
    "page size": ((6, lambda _: 0), "page_size must be above 0, got 0; give positions per page"),
    "into": ((7, slice(1)), "into must be 2 tensors, got 1; give input_ids and positions"),
    "positions": ((7, 1, lambda t: t[1:]), "into.positions must be [40], got [39]; sizes follow from"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_calls_say_what_is_wrong(wrong: str) -> None:
    (argument, *change), message = WRONG[wrong]
    call = arguments()
    if len(change) == 2:
        call[argument][change[0]] = change[1](call[argument][change[0]])
    elif isinstance(change[0], slice):
        call[argument] = call[argument][change[0]]
    else:
        call[argument] = change[0](call[argument])
    with pytest.raises(RuntimeError, match=f"step_rows: .*{re.escape(message)}"):
        ops.step_rows(*call)
