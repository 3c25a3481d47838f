"""A request that its constraint leaves nothing to do ends alone: no allowed token is drawn, or its canvas is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.constraint.test_denoise import compiled
from tests.draft.test_exact import CPU, LLADA, MASK, VOCAB, Request, SyntheticModel, drafter_of
from tests.draft.test_exact_cases import CHAIN
from vllm_dllm.constraint.answer import Answer
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.state.report import Column, Failed
from vllm_dllm.state.settle import Ledger, native_settle
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.walk import native_walk

LENGTH = 4
POLICIES = ("static", "static", "credit", "threshold")
IS_CONSTRAINED = (False, True, True, True)
BROKEN = 1
Spoil = Callable[[Tensor, Tensor], Tensor]  # canvases of the broken request, its logits -> what is there instead


@dataclass
class Outcome:
    """What became of some requests; of each its block, None where it ended, and why it did."""

    blocks: list[list[int] | None]
    failed: dict[int, int]
    after: list[int]  # the canvas of the broken one


def decode(spoil: Spoil, slots: list[int], *, is_native: bool, num_drafts: int, **broken: Any) -> Outcome:
    """Decode a block of some requests together, one of which is broken: its policy, and its canvas's first token."""
    state, model = CanvasState(len(POLICIES), LENGTH, MASK, CPU, LLADA), SyntheticModel(LENGTH, 2, 3.0)
    for slot in slots:
        policy = broken.get("policy", POLICIES[slot]) if slot == BROKEN else POLICIES[slot]
        params = Request(policy, 0.9, LENGTH, 0.0, 0, 1.0, 0).params(LLADA, LENGTH, LENGTH)
        answer = Answer(compiled("b*c"), 0, LENGTH, LENGTH, 0, LENGTH) if IS_CONSTRAINED[slot] else None
        state.add_request(slot, params, answer)
    state.canvas[BROKEN, 0] = broken.get("begins_with", MASK)
    state.apply_staged_writes()
    ops = (native_walk, native_settle, native_draws) if is_native else ()
    head = LogitsHead(torch.clone, VOCAB, MASK, is_native=is_native)
    denoiser = Denoiser(state, drafter_of(CHAIN if num_drafts else None, is_native=is_native), head, *ops)
    found = Outcome([None] * len(POLICIES), {}, [])
    for _ in range(LENGTH + 1):
        start = torch.zeros(len(slots), dtype=torch.int64)
        blocks = Blocks(torch.tensor(slots), torch.tensor(slots).numpy(), start)
        nodes = denoiser.nodes(blocks, num_drafts)
        logits = model.block_logits(nodes.canvas.flatten(0, 1)).unflatten(0, nodes.canvas.shape[:2])
        if BROKEN in slots:
            place = slots.index(BROKEN)
            logits[place] = spoil(nodes.canvas[place], logits[place])
        done = denoiser.advance(blocks, nodes, logits.flatten(0, 2))
        emission = denoiser.settle(blocks, nodes, done, Ledger(len(slots), start, start))
        for place, slot in enumerate(slots):
            if fault := int(emission.report[place, Column.FAULTS]):
                found.failed[slot] = fault
                assert (int(emission.num_sampled[place]), int(done.num_unmasked[place])) == (0, 0)
                found.after = state.canvas[slot].tolist()
            elif done.is_finished[place]:
                found.blocks[slot] = done.canvas[place].tolist()
        slots = [slot for slot in slots if slot not in found.failed and found.blocks[slot] is None]
        if not slots:
            return found
    raise AssertionError("a block does not end")


def nan(_canvas: Tensor, logits: Tensor) -> Tensor:
    return torch.full_like(logits, torch.nan)


def minus_inf(_canvas: Tensor, logits: Tensor) -> Tensor:
    return torch.full_like(logits, -torch.inf)


def later(canvas: Tensor, logits: Tensor) -> Tensor:
    """Behind the second step, be it a draft's."""
    return torch.where((canvas != MASK).sum(1)[:, None, None] > 1, -torch.inf, logits)


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
@pytest.mark.parametrize("num_drafts", [0, 7])
def test_one_that_no_allowed_token_is_drawn_for_ends_and_no_other(is_native: bool, num_drafts: int) -> None:
    others = [slot for slot in range(len(POLICIES)) if slot != BROKEN]
    alone = decode(later, others, is_native=is_native, num_drafts=num_drafts)
    assert not alone.failed
    assert None not in [alone.blocks[slot] for slot in others]
    # A NaN is drawn by the twin, as `argmax` has it, and by no op. Where all is -inf, `credit` may get an op's id -1.
    for spoil, policy in ((minus_inf, "credit"), (later, "static"), *([(nan, "static")] if is_native else [])):
        found = decode(spoil, [*range(len(POLICIES))], is_native=is_native, num_drafts=num_drafts, policy=policy)
        assert found.failed == {BROKEN: Failed.TOKEN}, spoil
        assert found.blocks == alone.blocks
        assert all(0 <= token < VOCAB for token in found.after), "the forward under way embeds them"
        # What a step decided before it found the fault is dropped.
        assert LENGTH - found.after.count(MASK) == (0 if spoil is not later else 1 if num_drafts else 2)


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
def test_one_whose_canvas_cannot_be_completed_ends_and_no_other(is_native: bool) -> None:
    found = decode(
        lambda _, logits: logits, [*range(len(POLICIES))], is_native=is_native, num_drafts=7, begins_with=VOCAB - 2
    )
    assert found.failed == {BROKEN: Failed.CANVAS}
    assert [block is None for block in found.blocks] == [False, True, False, False]
    assert found.after == [VOCAB - 2, MASK, MASK, MASK]
