"""Another drafter through the real denoiser: what it guesses, and how well, changes forwards and no token."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.draft.nonsense import KINDS, NonsenseDrafter
from tests.draft.test_exact import (
    DREAM,
    LLADA,
    MASK,
    REFERENCE_RULES,
    SDAR,
    VOCAB,
    Request,
    SyntheticModel,
    denoise,
    requests_of,
)
from tests.draft.test_look_ahead import ChainModel, decode, reference_options
from tests.suite.parts import some_of
from vllm_dllm.draft.drafter import Drafter
from vllm_dllm.reference import block_causal
from vllm_dllm.reference import decode as bidirectional
from vllm_dllm.reference.decode import KvPolicy
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import Nodes


@dataclass
class TextDrafter:
    """Takes each slot's tokens from a text, and random positions; it knows no graph and no candidates.

    Attributes:
        texts: [num_slots][num_positions], what it believes; wrong tokens are as good as right ones.
        chance: of positions to be filled from the left, as the policy `sequential` does.
    """

    texts: list[list[int]]
    chance: float
    rng: random.Random
    look_ahead_from: int | None = 5

    memory = None

    def prior(self) -> list[float]:
        return [0.0, 0.5, 0.8, 1.0]

    def attach(self, canvases: CanvasState) -> None:
        self._canvases = canvases

    def propose(self, blocks: Blocks, num_drafts: int, *, looks_ahead: bool) -> Nodes:
        block_length, mask = self._canvases.block_length, self._canvases.mask_token_id
        roots = Nodes.of_roots(self._canvases.canvas[blocks.slots], mask)
        if num_drafts == 0:
            return roots
        starts = blocks.start.tolist()
        believed = [self.texts[slot][s : s + block_length] for slot, s in zip(blocks.slots_np, starts, strict=True)]
        text = torch.tensor(believed)
        root = roots.canvas[:, 0]
        drafts = [
            torch.stack([self._guess(*pair, n) for n in range(num_drafts)]) for pair in zip(root, text, strict=True)
        ]
        canvas = torch.stack(drafts)
        is_valid = (canvas == mask).any(2)
        nodes = roots.with_drafts(canvas, is_valid, is_valid.long(), mask)
        if not looks_ahead:
            return nodes
        has_next = blocks.start + block_length < self._canvases.seq_len[blocks.slots]
        return nodes.with_look_ahead(torch.where(root == mask, text, root), has_next, mask)

    def _guess(self, root: Tensor, text: Tensor, number: int) -> Tensor:
        masked = (root == self._canvases.mask_token_id).nonzero()[:, 0].tolist()
        if self.rng.random() > self.chance:
            self.rng.shuffle(masked)
        filled, guess = masked[: number + 1], root.clone()
        guess[filled] = text[filled]
        return guess


def believing(texts: list[list[int]], share: float, seed: int) -> TextDrafter:
    """Return a drafter that knows a share of the tokens."""
    rng = random.Random(seed)
    known = [[token if rng.random() < share else rng.randrange(MASK + 1, VOCAB) for token in text] for text in texts]
    return TextDrafter(known, share, rng)


shares = st.sampled_from([0.0, 0.5, 0.9, 1.0])


@settings(max_examples=some_of(60), deadline=None)
@given(
    data=st.data(),
    block_length=st.sampled_from([1, 4, 7]),
    is_native=st.booleans(),
    rules=st.sampled_from([LLADA, DREAM, SDAR]),
    share=shares,
)
def test_any_drafter_is_lossless(
    data: st.DataObject, block_length: int, is_native: bool, rules: UnmaskRules, share: float
) -> None:
    model = SyntheticModel(block_length, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 3.0, 12.0])))
    requests = data.draw(st.lists(requests_of(block_length, rules), min_size=1, max_size=4))
    plain, plain_forwards, _ = denoise(model, requests, None, 0, rules=rules)
    drafter: Drafter = believing(plain, share, data.draw(st.integers(0, 99)))
    budget = data.draw(st.integers(0, 6))
    tokens, forwards, accepted = denoise(model, requests, drafter, budget, is_native=is_native, rules=rules)
    for i, request in enumerate(requests):
        options, prompt = request.reference(block_length), torch.tensor(request.tail, dtype=torch.int64)
        if rules is SDAR:
            reference = block_causal.generate(model, prompt, **options)  # type: ignore[arg-type]
        else:
            kv, kv_rules = KvPolicy("dual"), REFERENCE_RULES[rules]
            reference = bidirectional.generate(model, prompt, kv=kv, rules=kv_rules, **options)  # type: ignore[arg-type]
        assert tokens[i] == [*request.tail, *reference.tokens.tolist()]
        assert forwards[i] + accepted[i] == plain_forwards[i] == reference.nfe


@settings(max_examples=some_of(30), deadline=None)
@given(data=st.data(), block_length=st.sampled_from([2, 4, 8]), is_native=st.booleans(), share=shares)
def test_any_drafter_may_look_ahead(data: st.DataObject, block_length: int, is_native: bool, share: float) -> None:
    model = ChainModel(block_length, data.draw(st.integers(0, 99)), 3.0)
    requests = data.draw(st.lists(requests_of(block_length, SDAR), min_size=1, max_size=3))
    num_blocks, budget = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 7))
    references = [
        block_causal.generate(
            model, torch.tensor(each.tail, dtype=torch.int64), **reference_options(each, model, num_blocks)
        )
        for each in requests
    ]
    texts = [[*each.tail, *of.tokens.tolist()] for each, of in zip(requests, references, strict=True)]
    drafter = believing(texts, share, data.draw(st.integers(0, 99)))
    for row, text, of in zip(
        decode(model, requests, drafter, budget, num_blocks, is_native=is_native), texts, references, strict=True
    ):
        assert row.tokens == text
        assert row.took[:2].sum() == of.nfe


@pytest.mark.parametrize("is_native", [False, True], ids=["torch", "ops"])
def test_a_drafter_that_knows_saves_what_can_be_saved(is_native: bool) -> None:
    """Without that a lossless drafter could be one whose drafts are never looked at."""
    model, request = ChainModel(4, 0, 3.0), Request("sequential", 0.9, 4, 0.7, 0, 1.0, 5)
    plain = block_causal.generate(model, torch.tensor([], dtype=torch.int64), **reference_options(request, model, 5))
    drafter = believing([plain.tokens.tolist()], 1.0, 0)
    (row,) = decode(model, [request], drafter, 5, 5, is_native=is_native)
    assert row.tokens == plain.tokens.tolist()
    assert (plain.nfe, row.took.tolist()[:2], row.num_over) == (20, [5, 15], 4)


@settings(max_examples=some_of(60), deadline=None)
@given(data=st.data(), is_native=st.booleans(), rules=st.sampled_from([LLADA, DREAM, SDAR]))
def test_nonsense_changes_no_token(data: st.DataObject, is_native: bool, rules: UnmaskRules) -> None:
    model = SyntheticModel(4, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 3.0, 12.0])))
    requests = data.draw(st.lists(requests_of(4, rules), min_size=1, max_size=4))
    plain, plain_forwards, _ = denoise(model, requests, None, 0, is_native=is_native, rules=rules)
    kinds = data.draw(st.sampled_from([KINDS, *((kind,) for kind in KINDS)]))
    drafter: Drafter = NonsenseDrafter(VOCAB, kinds, data.draw(st.integers(0, 99)))
    tokens, forwards, accepted = denoise(model, requests, drafter, 6, is_native=is_native, rules=rules)
    assert tokens == plain
    assert [a + b for a, b in zip(forwards, accepted, strict=True)] == plain_forwards
