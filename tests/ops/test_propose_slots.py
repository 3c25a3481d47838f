"""The canvases of a step as the engine keeps them, by slot: natively as in torch."""

import pytest
import torch

from tests.draft.rankers import make_ranker
from tests.ops.test_propose_nodes import CPU, MASK, STEPS, arguments, case
from vllm_dllm.draft.compile import compile_graph
from vllm_dllm.draft.native import native_nodes, torch_nodes
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.drafts import DraftState
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.policy import POLICY_IDS


@pytest.mark.parametrize("tokens_per_step", STEPS)
def test_the_canvases_of_slots_equal_those_of_torch(tokens_per_step):
    """As the engine keeps them; some slots have no step behind them, some blocks are the last, some have a ranker."""
    for seed in range(8):
        given = case(8, tokens_per_step, seed, is_noisy=seed % 2 == 1)
        call = arguments(given, 4, seq_len=24)
        (slots, _), (canvas, *kept) = call[2], call[3]
        state = CanvasState(len(canvas), 8, MASK, CPU)
        for slot in range(len(canvas)):
            state.add_request(slot, request_params(slot, is_noisy=given.noise is not None))
        state.apply_staged_writes()
        state.canvas.copy_(canvas)
        memory = DraftState(state)
        for its, wanted in zip(memory.tensors, kept, strict=False):
            its.copy_(wanted)
        memory.is_known[slots[::3]] = False
        blocks = Blocks(slots, slots.numpy(), 8 * (slots % 3))
        graph = compile_graph(given.graph, CPU, make_ranker("small", seed) if seed % 4 > 1 else None)
        for num_drafts, looks_ahead in ((0, False), (4, False), (4, True)):
            expected, nodes = (
                way(graph, state, memory, blocks, num_drafts, looks_ahead) for way in (torch_nodes, native_nodes)
            )
            valid = expected.is_valid
            assert torch.equal(nodes.is_valid, valid)
            assert torch.equal(nodes.depth, expected.depth)
            for name in ("canvas", "is_masked"):
                assert torch.equal(getattr(nodes, name)[valid], getattr(expected, name)[valid])
            assert (nodes.end is None) == (expected.end is None)
            if nodes.end is not None:
                assert torch.equal(nodes.end, expected.end)
                assert 0 < valid[:, -1].sum() < len(slots)


def request_params(slot: int, *, is_noisy: bool) -> RequestParams:
    """Return a request whose last block begins at position 16."""
    return RequestParams(
        policy_id=POLICY_IDS["random" if is_noisy and slot % 3 == 0 else "static"],
        threshold=0.9,
        factor=1.0,
        entropy_bound=0.1,
        credit_alpha=0.0,
        credit_beta=0.0,
        credit_gamma=0.0,
        alg_temp=0.0,
        counts=(1,) * 8,
        times=(0.0,) * 8,
        prompt_len=0,
        seq_len=24,
        temperature=is_noisy * (slot % 2) * 0.7,
        top_k=slot % 4,
        top_p=1.0 - slot % 5 / 10,
        seed=slot,
    )
