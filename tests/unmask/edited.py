"""Requests with edits of logits, decoded over several blocks by the denoiser, together, and by the reference."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tests.draft.test_exact import CPU, MASK, REFERENCE_RULES, SDAR, VOCAB, Request, SyntheticModel, drafter_of
from vllm_dllm.denoiser import Denoiser, Observation
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.reference import block_causal, decode
from vllm_dllm.reference.decode import Generation, KvPolicy
from vllm_dllm.reference.edits import Edits
from vllm_dllm.state.canvas import Blocks, CanvasState
from vllm_dllm.state.draws import native_draws
from vllm_dllm.state.edits import NO_EDITS, LogitEdits
from vllm_dllm.state.records import NO_LOGPROBS
from vllm_dllm.state.settle import Emission, Ledger, native_settle
from vllm_dllm.unmask.head import EditedHead, LogitsHead
from vllm_dllm.unmask.logprobs import LogprobHead
from vllm_dllm.unmask.schedule import UnmaskRules
from vllm_dllm.unmask.walk import native_walk


class BlockModel(SyntheticModel):
    """A synthetic model whose sequences may end within a block."""

    def forward(self, ids: torch.Tensor, start: int = 0, kv: Any = None, **_: Any) -> tuple[torch.Tensor, Any]:
        missing = -len(ids) % self.block_length
        padded = torch.cat([ids, ids.new_full((missing,), MASK)])
        return super().forward(padded, start, kv)[0][: len(ids)], kv


@dataclass(frozen=True)
class Edited:
    """A request with a prompt and edits."""

    request: Request
    prompt: tuple[int, ...]
    edits: LogitEdits = NO_EDITS
    num_logprobs: int = NO_LOGPROBS

    def reference(self, model: SyntheticModel, num_blocks: int, rules: UnmaskRules) -> list[int]:
        return self.generation(model, num_blocks, rules).tokens.tolist()

    def generation(self, model: SyntheticModel, num_blocks: int, rules: UnmaskRules) -> Generation:
        options = self.request.reference(model.block_length)
        values = asdict(self.edits)
        min_p = values.pop("min_p")
        options["sampling"] = replace(options["sampling"], min_p=min_p, edits=Edits(**values))  # type: ignore[type-var]
        options["gen_length"] = num_blocks * model.block_length - len(self.prompt)
        prompt = torch.tensor(self.prompt)
        if rules is SDAR:
            return block_causal.generate(model, prompt, **options)  # type: ignore[arg-type]
        own = options["policy"]
        if own.steps:  # type: ignore[attr-defined]
            num_generated = options["gen_length"] // model.block_length  # type: ignore[operator]
            options["policy"] = replace(own, steps=own.steps * num_generated)  # type: ignore[type-var,attr-defined]
        kv = KvPolicy("dual")
        return decode.generate(model, prompt, kv=kv, rules=REFERENCE_RULES[rules], **options)  # type: ignore[arg-type]


class UneditedHead(LogitsHead):
    """A head of rows without edits; of several ranks each has a part of the vocabulary, where edits mean nothing."""

    def __call__(self, hidden: Any, sampling: Any, num_candidates: int, ids: Any = None) -> Any:
        assert ids is None or ids.edits is None
        return super().__call__(hidden, sampling, num_candidates, ids)


def denoiser_of(state: CanvasState, drafts: DraftGraph | None, *, is_native: bool) -> Denoiser:
    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()

    own = UneditedHead(logits, VOCAB, MASK, is_native=is_native)
    head = EditedHead(own, logits, VOCAB, MASK, is_native=is_native)
    natives = (native_walk, native_settle, native_draws) if is_native else ()
    logprob_head = LogprobHead(logits, VOCAB, MASK)
    return Denoiser(state, drafter_of(drafts, is_native=is_native), head, *natives, logprob_head=logprob_head)


@dataclass(frozen=True)
class Shown:
    """What is shown of a token."""

    token_ids: list[int]  # its own, then the likeliest
    log_probs: list[float]
    rank: int


def note_shown(shown: dict[int, list[Shown]], slots: list[int], emission: Emission) -> None:
    """Note what a step emits."""
    assert emission.logprobs is not None
    own = emission.logprobs.tokens
    for place, request in enumerate(emission.logprobs.place_np.tolist()):
        rows = (own.token_ids[place], own.log_probs[place], own.ranks[place])
        lists = [row[: emission.num_sampled[request]].tolist() for row in rows]
        shown.setdefault(slots[request], []).extend(Shown(*each) for each in zip(*lists, strict=True))


def check_shown(
    shown: list[Shown], tokens: list[int], log_probs: torch.Tensor, num_top: int, tolerance: float = 1e-4
) -> None:
    """Compare with the log-probabilities [num_tokens, vocab] of what each token could have been."""
    assert [each.token_ids[0] for each in shown] == tokens
    for each, row in zip(shown, log_probs, strict=True):
        own = float(row[each.token_ids[0]])
        assert each.log_probs[0] == pytest.approx(own, abs=tolerance)
        assert (row > own + tolerance).sum() < each.rank <= 1 + (row > own - tolerance).sum()
        top = each.log_probs[1 : 1 + num_top]
        best = row.sort(descending=True).values[:num_top].tolist()
        assert top == pytest.approx(best + [-math.inf] * (num_top - len(best)), abs=tolerance)
        ids = each.token_ids[1 : 1 + min(num_top, len(row))]
        assert len({*ids}) == len(ids)
        assert row[ids].tolist() == pytest.approx(top[: len(ids)], abs=tolerance)


def answers(
    model: SyntheticModel,
    requests: list[Edited],
    drafts: DraftGraph | None,
    budget: int,
    num_blocks: int,
    *,
    is_native: bool = True,
    rules: UnmaskRules,
    shown: dict[int, list[Shown]] | None = None,
    observer: Callable[[Observation], None] | None = None,
) -> list[list[int]]:
    """Decode requests together; a sequence has `num_blocks` blocks, and the prompt is in the first ones.

    Log-probabilities of those that ask for some are put into `shown`, by request. The observer sees each step.
    """
    length, num_reqs = model.block_length, len(requests)
    state = CanvasState(num_reqs, length, MASK, CPU, rules)
    history = state.edits.history = torch.full((num_reqs, num_blocks * length), 7, dtype=torch.int32)
    start = torch.tensor([len(r.prompt) // length * length for r in requests])
    for slot, r in enumerate(requests):
        params = r.request.params(rules, length, num_blocks * length)
        state.add_request(slot, replace(params, prompt_len=len(r.prompt), edits=r.edits, num_logprobs=r.num_logprobs))
        history[slot, : len(r.prompt)] = torch.tensor(r.prompt)
        tail = r.prompt[start[slot] :]
        state.canvas[slot, : len(tail)] = torch.tensor(tail, dtype=torch.int64)
    state.apply_staged_writes()
    denoiser = denoiser_of(state, drafts, is_native=is_native)
    denoiser.observer = observer
    while len(slots := torch.nonzero(start < num_blocks * length)[:, 0]):
        begin = start[slots]
        blocks = Blocks(slots, slots.numpy(), begin)
        goes_over = (
            drafts is not None and budget > 1 and rules is SDAR and bool((begin < (num_blocks - 1) * length).all())
        )
        nodes = denoiser.nodes(blocks, budget, looks_ahead=goes_over)
        hidden = model.block_logits(nodes.canvas.flatten(0, 1)).flatten(0, 1)
        done = denoiser.advance(blocks, nodes, hidden)
        known = torch.maximum(begin, torch.tensor([len(requests[slot].prompt) for slot in slots]))
        emission = denoiser.settle(blocks, nodes, done, Ledger(len(slots), known, begin))
        if shown is not None and emission.logprobs is not None:
            note_shown(shown, slots.tolist(), emission)
        for slot, canvas in zip(slots[done.is_finished], done.canvas[done.is_finished], strict=True):
            history[slot, start[slot] : start[slot] + length] = canvas.int()
            start[slot] += length
    return [row[len(r.prompt) :].tolist() for r, row in zip(requests, history, strict=True)]


TOKENS = st.sampled_from([token for token in range(VOCAB) if token != MASK])


@st.composite
def edits(draw: st.DrawFn, *, temperature: float) -> LogitEdits:
    """What leaves every position a token: one that is allowed is no end token and in no bad word."""
    free = draw(TOKENS)
    others = st.lists(TOKENS.filter(lambda token: token != free), max_size=4).map(tuple)
    allowed = draw(st.just(()) | others.map(lambda ids: (free, *ids)))
    word = st.lists(st.sampled_from([5, 6, 8]).filter(lambda token: token != free), min_size=1, max_size=4).map(tuple)
    return LogitEdits(
        allowed_ids=allowed,
        bias=tuple(draw(st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 2.0, 6.0]), max_size=3)).items()),
        end_ids=draw(others),
        min_tokens=draw(st.sampled_from([0, 0, 3, 9])),
        repetition=draw(st.sampled_from([1.0, 1.0, 1.5, 0.5])),
        frequency=draw(st.sampled_from([0.0, 0.0, 1.0, -0.5])),
        presence=draw(st.sampled_from([0.0, 0.0, 2.0, -0.25])),
        bad_words=tuple(draw(st.lists(word, max_size=5))),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.6])) if temperature else 0.0,
    )
