"""Spiffy over WeDLM's windows: the decoder's tokens and transitions, in fewer calls."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.reference.test_wedlm import CASES, GREEDY, PROMPT, PUBLISHED, make_model
from vllm_dllm.reference import wedlm, wedlm_spiffy
from vllm_dllm.reference.edits import Edits, Known
from vllm_dllm.reference.sampling import Sampling
from vllm_dllm.reference.wedlm import Masked, WindowRule

EDITED = replace(GREEDY, edits=Edits(repetition=1.3, presence=0.5, bad_words=((11,), (7, 7))))
SAMPLINGS = {"greedy": GREEDY, "sampled": replace(GREEDY, seed=7, temperature=0.8, top_k=5), "edited": EDITED}
ALL = {**CASES, "several": (40, 16, WindowRule(entropy_bound=2.6))}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("case", ALL)
def test_equals_the_decoder_in_no_more_calls(case: str, sampling: str) -> None:
    model, (gen_length, window, rule) = make_model(), ALL[case]
    given: dict[str, Any] = {"gen_length": gen_length, "window": window, "rule": rule, "sampling": SAMPLINGS[sampling]}
    expected = wedlm.generate(model, torch.tensor(PROMPT), **given)
    for num_drafts in (0, 3, window):
        found = wedlm_spiffy.generate(model, torch.tensor(PROMPT), num_drafts=num_drafts, **given)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.steps == expected.steps
        assert found.nfe + found.num_accepted == expected.nfe
        assert found.num_accepted <= found.num_proposed <= num_drafts * found.nfe
        assert found.num_rows >= (found.nfe + found.num_proposed), "a state has its window's rows at least"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_drafts_save_calls_also_where_the_window_slid(sampling: str) -> None:
    model, (gen_length, window, rule) = make_model(), ALL["published"]
    given: dict[str, Any] = {"gen_length": gen_length, "window": window, "rule": rule, "sampling": SAMPLINGS[sampling]}
    found = wedlm_spiffy.generate(model, torch.tensor(PROMPT), num_drafts=4, **given)
    assert found.num_accepted >= len(found.steps) // 6
    states = found.nfe + found.num_proposed
    assert found.num_rows > window * states, "a draft that has emitted has those rows besides"


def test_the_end_of_an_answer_ends_the_calls() -> None:
    """At a stop token, at the limit, and in any length; what a call computed beyond them is dropped."""
    model, (gen_length, window, rule) = make_model(), ALL["many"]
    given: dict[str, Any] = {"window": window, "rule": rule, "sampling": GREEDY}
    prompt = torch.tensor(PROMPT)
    tokens = wedlm.generate(model, prompt, gen_length=gen_length, **given).tokens.tolist()
    stop = tokens[len(tokens) // 2]
    changes: list[dict[str, Any]] = [
        {"stop_ids": (stop,)},
        {"limit": len(PROMPT) + 21},
        {"gen_length": 1},
        {"gen_length": 17},
    ]
    for changed in changes:
        own = {"gen_length": gen_length} | given | changed
        expected = wedlm.generate(model, prompt, **own)
        found = wedlm_spiffy.generate(model, prompt, num_drafts=5, **own)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.steps == expected.steps
        assert found.nfe <= expected.nfe


def test_a_draft_knows_the_lowest_entropies_first() -> None:
    """And of an open position what its step would choose; what the window has gained since is in none."""
    decoder = wedlm_spiffy._Decoder(
        make_model(), PUBLISHED, Sampling(forbidden_ids=(0,)), window=4, last=7, stop_ids=()
    )
    margins = torch.tensor([1.0, 9.0, 3.0, 5.0])  # of the likeliest token, at positions 2 to 5
    logits = torch.zeros(4, 6)
    logits[torch.arange(4), torch.tensor([1, 2, 3, 4])] = margins
    before = Masked(torch.tensor([2, 3, 4, 5]), logits)
    tokens = torch.tensor([5, 5, 0, 2, 0, 0, 0])
    root = Known(tokens, torch.tensor([False, False, True, False, True, True, True]), 2)
    drafts = decoder.drafts(root, before, 5)
    assert [draft.tokens.tolist() for draft in drafts] == [
        [5, 5, 0, 2, 0, 4, 0],
        [5, 5, 0, 2, 3, 4, 0],
        [5, 5, 1, 2, 3, 4, 0],
    ]
    assert [decoder.start(draft) for draft in drafts] == [2, 2, 6], "the last one's window has slid"
    assert len(decoder.drafts(root, before, 2)) == 2
