"""`row_draws` equals `state.draws.torch_draws`, on each device: canvases of any slots, all or those evaluated."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import simt
from tests.ops.test_step_rows import moved
from tests.state.test_canvas import request as request_params
from vllm_dllm import ops
from vllm_dllm.ops.vocab_stats import RowSampling
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws, torch_draws
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import Nodes

MASK = 3
FIELDS = ("temperature", "top_k", "top_p", "keys")
WHERE = ["cpu", simt.WHERE, pytest.param("cuda", marks=pytest.mark.gpu)]


def random_call(
    num_reqs: int, seed: int, *, looks_ahead: bool, is_part: bool, where: str = "cpu"
) -> tuple[CanvasState, Blocks, Nodes]:
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    num_nodes, block_length, num_slots = 2 + seed % 4, 1 + seed % 9, num_reqs + 2
    device = torch.device("cuda" if where == "cuda" else "cpu")
    rules = UnmaskRules(confidence="sampled") if seed % 2 else UnmaskRules()
    state = CanvasState(num_slots, block_length, MASK, device, rules)
    for slot in range(num_slots):
        tables = {"counts": (1,) * block_length, "times": (0.0,) * block_length}
        drawn = {"temperature": slot % 3 / 2, "top_k": slot % 4 * (seed % 3), "top_p": 1.0 - slot % 2 * (seed % 3) / 9}
        state.add_request(slot, request_params(seed=int(whole(-(2**62), 2**62, 1)), **tables, **drawn))
    state.apply_staged_writes()
    slots = torch.randperm(num_slots, generator=generator)[:num_reqs]
    blocks = Blocks(slots, slots.numpy(), whole(0, 2**40, num_reqs))
    canvas = whole(MASK - 2, MASK + 2, num_reqs, num_nodes, block_length)
    is_valid = torch.ones(num_reqs, num_nodes, dtype=torch.bool)
    nodes = Nodes(canvas, canvas == MASK, is_valid, is_valid.long(), canvas[:, 0] if looks_ahead else None)
    if is_part:
        evaluated = whole(-1, 1, num_reqs, num_nodes)
        place = (evaluated.flatten() >= 0).nonzero().flatten()
        nodes = nodes.only(evaluated, place)
    return state, moved(blocks, where), moved(nodes, where)


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "simt":
        monkeypatch.setattr(ops, "row_draws", lambda *args: simt.ops().row_draws(*args))
    return str(request.param)


@pytest.mark.parametrize("num_reqs", [0, 1, 7])
def test_equals_the_torch_twin(num_reqs: int, where: str) -> None:
    kinds = set()
    for seed in range(24):
        options = {"looks_ahead": seed % 2 == 0, "is_part": seed % 3 == 0}
        expected: RowSampling = torch_draws(*random_call(num_reqs, seed, **options))
        found = native_draws(*random_call(num_reqs, seed, **options, where=where))
        for name in FIELDS:
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
        assert (found.has_filter, found.wants_sampled) == (expected.has_filter, expected.wants_sampled)
        kinds.add((found.has_filter, found.wants_sampled))
    assert len(kinds) == (4 if num_reqs else 2)


def arguments() -> list[Any]:
    """The op's arguments, of 5 requests with 5 canvases of 4 positions, some of them evaluated."""
    state, blocks, nodes = random_call(5, 3, looks_ahead=True, is_part=True)
    return [[blocks.slots, blocks.start], nodes.is_masked, nodes.place, state.draw_params, True]


@pytest.mark.usefixtures("collected")
def test_opcheck() -> None:
    call = arguments()
    ops.row_draws(*call)
    torch.library.opcheck(torch.ops.vllm_dllm.row_draws.default, tuple(call))
    torch.library.opcheck(torch.ops.vllm_dllm.row_draws.default, (*call[:2], None, *call[3:]))


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "requests": ((0, slice(1)), "requests must be 2 tensors, got 1; give slots and start"),
    "slots": ((0, 0, lambda t: t + 9), "allowed are 0..6; give those of the step"),
    "start": ((0, 1, lambda t: t[1:]), "requests.start must be [5], got [4]; sizes follow from is_masked, place and"),
    "is_masked": ((1, lambda t: t[0]), "is_masked must be [num_reqs, num_canvases, block_length], got [5, 4]; give"),
    "place": ((2, lambda t: t + 99), "allowed are 0..24; give those of the step"),
    "params": ((3, slice(3)), "params must be 4 tensors, got 3; give seed, top_k, temperature and top_p"),
    "top_p": ((3, 3, lambda t: t.float()), "params.top_p must be Double, got Float; convert it with .to()"),
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
    with pytest.raises(RuntimeError, match=f"row_draws: .*{re.escape(message)}"):
        ops.row_draws(*call)


def test_a_canvas_of_the_next_block_draws_with_its_positions() -> None:
    state, blocks, nodes = random_call(5, 8, looks_ahead=True, is_part=False)
    of_next = replace(blocks, start=blocks.start + state.block_length)
    keys, of_others = (
        native_draws(state, each, nodes).keys.view(5, -1, state.block_length) for each in (blocks, of_next)
    )
    assert not (keys[:, -1] == of_others[:, -1]).any()
    alone = native_draws(state, of_next, replace(nodes, end=None)).keys.view(5, -1, state.block_length)
    assert torch.equal(keys[:, -1], alone[:, -1])
