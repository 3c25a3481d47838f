"""What a step makes of requests whose answers end under a constraint."""

from dataclasses import replace

import pytest
import torch

from tests.constraint.test_denoise import compiled
from tests.draft.test_exact import CPU, MASK, SDAR, VOCAB, Request
from vllm_dllm.constraint.answer import Answer
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.state.ends import Ends
from vllm_dllm.state.settle import Ledger, native_settle
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.walk import native_walk


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
def test_an_answer_that_ended_within_its_block_says_nothing_of_the_next_one(is_native: bool) -> None:
    """A step is scheduled behind it where the host learns of the end later."""
    state = CanvasState(1, 4, MASK, CPU, SDAR)
    params = Request("threshold", 0.9, 4, 0.0, 0, 1.0, 0, tail=(9,)).params(SDAR, 4, 8)
    answer = Answer(compiled("cc"), 1, 3, 8, 0, 4)
    state.add_request(0, replace(params, ends=Ends(limit=3)), answer)
    state.canvas[0, 0] = 9
    state.apply_staged_writes()
    ops = (native_walk, native_settle, native_draws) if is_native else ()
    denoiser = Denoiser(state, None, LogitsHead(torch.clone, VOCAB, MASK, is_native=is_native), *ops)
    sure_of_b = torch.zeros(4, VOCAB)
    sure_of_b[:3, 2] = 30.0  # and of nothing at the last position
    emitted = []
    for start, known in ((0, 1), (4, 4)):
        blocks = Blocks(torch.tensor([0]), torch.tensor([0]).numpy(), torch.tensor([start]))
        nodes = denoiser.nodes(blocks, 0)
        done = denoiser.advance(blocks, nodes, sure_of_b)
        ledger = Ledger(1, torch.tensor([known]), torch.tensor([0]))
        emitted.append((done.canvas[0].tolist(), int(denoiser.settle(blocks, nodes, done, ledger).num_sampled[0])))
    assert emitted == [([9, 9, 9, MASK], 3), ([2, 2, 2, MASK], 0)]
    assert not state.answers
