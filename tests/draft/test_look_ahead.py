"""The batched denoiser with look-aheads against the decoder and the plain statement of Spiffy, over several blocks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft.test_exact import CPU, MASK, SDAR, VOCAB, Request, SyntheticModel, drafter_of, graphs, requests_of
from tests.suite.parts import some_of
from vllm_dllm.config import DllmConfig
from vllm_dllm.denoiser import Denoiser
from vllm_dllm.draft.drafter import Drafter
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.look_ahead import smallest_budget
from vllm_dllm.draft.readiness import Readiness
from vllm_dllm.reference import block_causal, policy, spiffy
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.state.settle import Ledger, native_settle
from vllm_dllm.unmask.head import LogitsHead
from vllm_dllm.unmask.walk import native_walk

CHAIN = DraftGraph(tuple(tuple((i, 0) for i in range(n)) for n in range(1, 4)), tokens_per_step=1)


class ChainModel(SyntheticModel):
    """Logits that depend on the block before, too, as it was stored."""

    def __init__(self, block_length: int, seed: int, sharpness: float) -> None:
        super().__init__(block_length, seed, sharpness)
        generator = torch.Generator().manual_seed(seed + 1)
        self.behind = 2 * torch.randn(block_length, VOCAB, block_length, VOCAB, generator=generator) / block_length**0.5

    def logits(self, canvas: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """Map canvases [num_canvases, block_length] behind one block each to [num_canvases, block_length, VOCAB]."""
        own = self.block_logits(canvas)
        return own if before is None else own + self.behind[torch.arange(self.block_length), before].sum(1)

    def forward(self, ids: torch.Tensor, start: int = 0, kv: Any = None, **_: Any) -> tuple[torch.Tensor, Any]:
        """Predict and store as `Qwen.forward`; what is stored are the tokens."""
        stored = torch.cat([*(kv or [])[:1], ids])
        before = stored[None, start - self.block_length : start] if start else None
        return self.logits(ids.view(-1, self.block_length), before).flatten(0, 1), [stored]


class Row:
    """One request in the denoiser: its blocks, and what they took."""

    def __init__(self, request: Request, slot: int, state: CanvasState, num_blocks: int) -> None:
        self.slot, self.start, self.is_stored = slot, 0, True
        self.tokens: list[int] = []
        self.took = np.zeros(3, dtype=np.int64)  # forwards, accepted, proposed
        self.num_over = 0
        block_length = state.block_length
        self.end = num_blocks * block_length
        state.add_request(slot, request.params(SDAR, block_length, self.end))
        state.canvas[slot, : len(request.tail)] = torch.tensor(request.tail, dtype=torch.int64)

    def before(self, num_nodes: int, end: torch.Tensor | None, block_length: int) -> torch.Tensor | None:
        """Return what is stored before the block of each node; a look-ahead's next root is the last."""
        if self.start == 0 and end is None:
            return None
        stored = torch.tensor(self.tokens[-block_length:] or [0] * block_length).repeat(num_nodes, 1)
        if end is not None:
            stored[-1] = end
        return stored


def step(model: ChainModel, denoiser: Denoiser, row: Row, budget: int, look_ahead_from: int | None) -> None:
    """Take one step of one request as the engine does."""
    block_length = model.block_length
    num_drafts = budget if row.is_stored else 0
    looks_ahead = look_ahead_from is not None and num_drafts >= look_ahead_from
    blocks = Blocks(torch.tensor([row.slot]), np.array([row.slot]), torch.tensor([row.start]))
    nodes = denoiser.nodes(blocks, num_drafts - 2 * looks_ahead, looks_ahead=looks_ahead)
    canvas = nodes.canvas[0]
    before = row.before(len(canvas), None if nodes.end is None else nodes.end[0], block_length)
    hidden = model.logits(canvas, before)
    if row.start == 0:
        first = len(canvas) - looks_ahead
        hidden = torch.cat([model.logits(canvas[:first], None), hidden[first:]])
    decision = denoiser.advance(blocks, nodes, hidden.flatten(0, 1))
    emitted = denoiser.settle(blocks, nodes, decision, Ledger(1, blocks.start, blocks.start))
    assert emitted.num_sampled.tolist() == [block_length * bool(decision.is_finished)]
    came_over = bool(decision.came_over)
    had_masks = bool(nodes.is_masked[0, 0].any())
    row.took += (had_masks or came_over, int(decision.num_accepted), int(nodes.is_valid[0, 1:].sum()) * had_masks)
    row.num_over += came_over
    row.is_stored = True
    if decision.is_finished:
        row.tokens += decision.canvas[0].tolist()
        row.start += block_length
        row.is_stored = came_over


def decode(
    model: ChainModel,
    requests: list[Request],
    drafts: DraftGraph | Drafter,
    budget: int,
    num_blocks: int,
    *,
    is_native: bool,
) -> list[Row]:
    """Decode some requests, from slots of one state."""
    state = CanvasState(len(requests), model.block_length, MASK, CPU, SDAR, vocab_size=VOCAB)
    rows = [Row(request, slot, state, num_blocks) for slot, request in enumerate(requests)]
    state.apply_staged_writes()
    drafter = drafter_of(drafts, is_native=is_native)
    head = LogitsHead(lambda hidden: hidden.clone(), VOCAB, MASK, is_native=is_native)
    denoiser = Denoiser(state, drafter, head, *((native_walk, native_settle, native_draws) if is_native else ()))
    server = DllmConfig(block_length=model.block_length, kv_policy="block_causal")
    for row in rows:
        while row.start < row.end:
            step(model, denoiser, row, budget, smallest_budget(server, is_async=False))
    return rows


def reference_options(request: Request, model: ChainModel, num_blocks: int) -> dict[str, Any]:
    options = request.reference(model.block_length)
    return options | {"gen_length": num_blocks * model.block_length - len(request.tail)}


@settings(max_examples=some_of(60), deadline=None)
@given(
    data=st.data(),
    block_length=st.sampled_from([2, 4, 8, 9]),
    sharpness=st.sampled_from([3.0, 12.0]),
    is_native=st.booleans(),
)
def test_look_aheads_change_forwards_and_no_token(
    data: st.DataObject, block_length: int, sharpness: float, is_native: bool
) -> None:
    model = ChainModel(block_length, data.draw(st.integers(0, 99)), sharpness)
    requests = data.draw(st.lists(requests_of(block_length, SDAR), min_size=1, max_size=3))
    graph = data.draw(graphs(block_length))
    budget = min(data.draw(st.integers(4, 7)), len(graph))
    num_blocks = data.draw(st.integers(1, 4))
    for row, request in zip(
        decode(model, requests, graph, budget, num_blocks, is_native=is_native), requests, strict=True
    ):
        options, prompt = reference_options(request, model, num_blocks), torch.tensor(request.tail, dtype=torch.int64)
        plain = block_causal.generate(model, prompt, **options)
        expected = spiffy.generate(model, prompt, graph=graph, budget=budget, rules=policy.SDAR, **options)
        assert row.tokens == [*request.tail, *plain.tokens.tolist()]
        assert expected.tokens.tolist() == plain.tokens.tolist()
        assert row.took.tolist() == [expected.nfe, expected.num_accepted, expected.num_proposed]
        assert expected.nfe + expected.num_accepted == plain.nfe
        if budget < 5 or block_length > 8:
            assert row.num_over == 0


@pytest.mark.parametrize(
    ("kv_policy", "block_length", "is_async", "expected"),
    [
        ("block_causal", 4, False, 5),
        ("block_causal", 8, False, 5),
        ("block_causal", 9, False, None),
        ("block_causal", 4, True, None),
        ("dual", 4, False, None),
    ],
)
def test_who_looks_ahead(kv_policy: Any, block_length: int, is_async: bool, expected: int | None) -> None:
    server = DllmConfig(block_length=block_length, kv_policy=kv_policy)
    assert smallest_budget(server, is_async=is_async) == expected


def test_nodes_that_came_true_more_often_than_expected_are_ranked_alike() -> None:
    """Their scores are above that of a certain node."""
    formulas = (((0, 0),), ((0, 1),), ((1, 0),), ((1, 1),), ((0, 0), (1, 0)))
    graph = DraftGraph(formulas, None, (1, 3, 1, 3, 1), 100, Readiness(1.0, (0.0, 0.0), 0.0), (0.0,) * 5)
    model, request = ChainModel(9, 35, 12.0), Request("random", 0.1, 9, 0.0, 0, 1.0, 0, tail=(0,))
    options = reference_options(request, model, 1)
    expected = spiffy.generate(model, torch.tensor([0]), graph=graph, budget=4, rules=policy.SDAR, **options)
    for is_native in (False, True):
        (row,) = decode(model, [request], graph, 4, 1, is_native=is_native)
        assert row.took.tolist() == [expected.nfe, expected.num_accepted, expected.num_proposed]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_predictable_model_takes_one_forward_per_chain(temperature: float) -> None:
    """Blocks of two: the first forward draws one position, each other one the second and the next block's first."""
    model = ChainModel(2, 0, 5.0)
    model.context.zero_()
    request = Request("static", 0.9, 2, temperature, 0, 1.0, 5)
    (row,) = decode(model, [request], CHAIN, 5, 7, is_native=True)
    assert (row.num_over, row.took.tolist()) == (6, [8, 6, 6])


@pytest.mark.parametrize("steps", [1, 4])
def test_blocks_that_end_at_once_count_one_forward_each(steps: int) -> None:
    """A next root's step may finish its block; the forward that emits it decides the block behind it."""
    model = ChainModel(4, 3, 5.0)
    model.context.zero_()
    request = replace(Request("threshold", 0.01, 4, 0.0, 0, 1.0, 5), threshold=0.01 if steps == 1 else 0.9)
    (row,) = decode(model, [request], CHAIN, 5, 6, is_native=True)
    options = reference_options(request, model, 6)
    plain = block_causal.generate(model, torch.tensor([], dtype=torch.int64), **options)
    assert row.tokens == plain.tokens.tolist()
    assert row.took[:2].sum() == plain.nfe
