"""Log-probabilities of tokens: those of the reference, whatever is drafted, and of whoever asks alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft.test_exact import DREAM, LLADA, MASK, SDAR, VOCAB, Request, graphs
from tests.suite.parts import some_of
from tests.unmask.edited import BlockModel, Edited, Shown, answers, check_shown
from tests.unmask.test_edits import NUM_BLOCKS, edited_requests
from vllm_dllm.ops.vocab_stats import RowIds
from vllm_dllm.state.records import NO_LOGPROBS, LogprobRecords
from vllm_dllm.unmask import logprobs
from vllm_dllm.unmask.logprobs import LogprobHead, TokenLogprobs, Unmasked
from vllm_dllm.unmask.schedule import UnmaskRules


@settings(max_examples=some_of(100), deadline=None)
@given(
    data=st.data(),
    block_length=st.sampled_from([1, 4, 5]),
    sharpness=st.sampled_from([0.0, 3.0, 12.0]),
    is_native=st.booleans(),
    rules=st.sampled_from([LLADA, DREAM, SDAR]),
)
def test_they_are_of_the_step_that_unmasked_the_token(
    data: st.DataObject, block_length: int, sharpness: float, is_native: bool, rules: UnmaskRules
) -> None:
    model = BlockModel(block_length, data.draw(st.integers(0, 99)), sharpness)
    asks = st.sampled_from([NO_LOGPROBS, 0, 1, 3, 20])
    requests = [
        replace(each, num_logprobs=data.draw(asks))
        for each in data.draw(st.lists(edited_requests(block_length, rules), min_size=1, max_size=4))
    ]
    graph, budget = data.draw(graphs(block_length)), data.draw(st.integers(1, 12))
    for drafts, num_drafts in ((None, 0), (graph, min(budget, len(graph)))):
        shown: dict[int, list[Shown]] = {}
        answers(model, requests, drafts, num_drafts, NUM_BLOCKS, is_native=is_native, rules=rules, shown=shown)
        assert {*shown} == {slot for slot, each in enumerate(requests) if each.num_logprobs != NO_LOGPROBS}
        for slot, its in shown.items():
            expected = requests[slot].generation(model, NUM_BLOCKS, rules)
            check_shown(its, expected.tokens.tolist(), expected.log_probs, requests[slot].num_logprobs)


def test_nobody_computes_what_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    head = LogprobHead._of_chunk
    monkeypatch.setattr(LogprobHead, "_of_chunk", lambda *args: rows.append(len(args[1])) or head(*args))
    model, request = BlockModel(4, 0, 3.0), Request("static", 0.9, 4, 0.0, 0, 1.0, 0)
    of = Edited(request, (7, 7, 7, 7))
    answers(model, [of], None, 0, NUM_BLOCKS, rules=LLADA)
    assert rows == []
    answers(model, [replace(of, num_logprobs=2), of], None, 0, NUM_BLOCKS, rules=LLADA)
    assert rows == [1] * 12  # a position per step of the request that asks


def test_rows_come_in_chunks_and_keep_to_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "TORCH_BYTES", 8 * VOCAB * 3)
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0))
    allowed = torch.tensor([[0b110101]], dtype=torch.int32).expand(8, 1)
    found = LogprobHead(lambda hidden: hidden.clone(), VOCAB, MASK)(
        logits, torch.full((8,), 5), 4, RowIds(allowed=allowed)
    )
    expected = logits.clone()
    expected[:, [token for token in range(VOCAB) if token not in (0, 2, 4, 5)]] = -torch.inf
    expected = expected.log_softmax(1)
    torch.testing.assert_close(found.log_probs[:, 1:], expected.topk(4).values)
    assert found.log_probs[:, 0].tolist() == pytest.approx(expected[:, 5].tolist())
    assert found.ranks.tolist() == (1 + (expected > expected[:, 5:6]).sum(1)).tolist()


def test_what_no_step_unmasked_is_certain_and_nobody_elses() -> None:
    """A slot's new request, which begins with a token that it gave itself, sees nothing of the one before."""
    records, slots = LogprobRecords(2, 3, torch.device("cpu")), torch.tensor([1])
    found = TokenLogprobs.empty(1, 1, 3, 3, device=slots.device)
    found.log_probs.fill_(-7.0)
    found.token_ids.fill_(9)
    found.ranks.fill_(2)

    def take(is_new: list[bool], tokens: list[int], *, is_finished: bool) -> TokenLogprobs:
        asking = records.asking(slots, slots.numpy())
        assert asking is not None
        none = torch.zeros(1, 1, 3, dtype=torch.int64)
        unmasked = Unmasked(none, torch.tensor([[tokens]]), torch.tensor([[is_new]]))
        return records.take(asking, unmasked, found, torch.tensor([0]), torch.tensor([is_finished])).tokens

    records.put(1, 2)
    take([True, True, False], [5, 6, 3], is_finished=False)
    for finished in (take([False, False, True], [5, 6, 8], is_finished=True),):
        assert finished.ranks.tolist() == [[2, 2, 2]]
    own = take([False, True, True], [4, 6, 8], is_finished=True)  # its next block
    assert own.ranks.tolist() == [[1, 2, 2]]
    assert own.token_ids[0].tolist() == [[4, 4, 4], [9, 9, 9], [9, 9, 9]]
    assert own.log_probs[0, 0].tolist() == [0.0, 0.0, 0.0]
    take([True, True, True], [5, 6, 8], is_finished=False)
    records.put(1, 2)
    assert take([True, False, False], [5, 7, 7], is_finished=True).log_probs[0, :, 0].tolist() == [-7.0, 0.0, 0.0]


def test_a_token_that_no_step_unmasked_is_certain_however_it_is_read() -> None:
    """Replies name the places of a token by it, so that the last one counts."""
    made = TokenLogprobs.empty(1, 2, 1 + 5, device=torch.device("cpu")).given(torch.tensor([[7, 8]]))
    by_token = [
        dict(zip(*row, strict=True)) for row in zip(made.token_ids[0].tolist(), made.log_probs[0].tolist(), strict=True)
    ]
    assert by_token == [{7: 0.0}, {8: 0.0}]
