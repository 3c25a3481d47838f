"""Likelihoods of continuations: engine == reference, in fp32; what cannot be scored is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.rig import MAX_MODEL_LEN, Case, Oracle, mixed_cases, run_outputs, shared_engine
from tests.e2e.scores import check_scores
from vllm_dllm.engine.scoring import Question, loglikelihood
from vllm_dllm.reference import loglikelihood as reference

SETTINGS = {"block_length": 8}
pytestmark = [pytest.mark.engine, pytest.mark.xdist_group(f"llada {SETTINGS}")]


@pytest.fixture
def llm(wild: Path) -> Any:
    return shared_engine(wild, SETTINGS)


def test_estimates_are_the_references_beside_other_requests(llm: Any, oracle: Oracle) -> None:
    cases = mixed_cases(8, seed=41)[:6]
    check_scores(llm, oracle, cases, [oracle.tokens(case, SETTINGS) for case in cases])


def test_text_is_split_where_the_continuation_begins(llm: Any) -> None:
    tokenizer = llm.get_tokenizer()
    context, continuation = tokenizer.encode("61 + 27 ="), tokenizer.encode("61 + 27 = 88")
    (found,) = loglikelihood(llm, Question("61 + 27 = ", ["88"], samples=3))
    ids = continuation[len(context) :]
    assert len(found.tokens) == len(ids)
    assert loglikelihood(llm, Question(context, [ids], samples=3)) == [found]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"context": []}, "context has no tokens, allowed is one and more"),
        ({"continuations": [[5], []]}, "continuations[1] has no tokens"),
        ({"continuations": []}, "continuations is [], allowed are lists of 1 to 128"),
        ({"continuations": ["a"]}, "continuations[0] is 'a', but context is [5, 6]; allowed are texts for both"),
        ({"continuations": [[5, 3]]}, "continuations[0] has the token 3, allowed are ids from 0 to"),
        ({"context": [10**6]}, "context has the token 1000000, allowed are ids"),
        ({"samples": 0}, "samples is 0, allowed are whole numbers from 1 to 1024"),
        ({"seed": 2**63}, "seed is 9223372036854775808, allowed are 64-bit"),
        ({"context": [5] * (MAX_MODEL_LEN - 8), "continuations": [[6] * 9]}, "which take 136 positions in blocks of 8"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm: Any, changes: dict[str, Any], text: str) -> None:
    question = Question(**({"context": [5, 6], "continuations": [[7]]} | changes))
    with pytest.raises(ValueError, match=re.escape(text)):
        loglikelihood(llm, question)


def test_nobody_else_may_have_a_block_scored(llm: Any) -> None:
    case = Case(prompt=(5, 6), max_tokens=8)
    with pytest.raises(ValueError, match="vllm_dllm_targets is set, which the front end sets itself"):
        run_outputs(llm, [case], extra_args={"vllm_dllm_targets": [7]})


def test_the_longest_sequence_is_scored(llm: Any, oracle: Oracle) -> None:
    context, continuation = [5 + i % 90 for i in range(MAX_MODEL_LEN - 16)], [9] * 16
    (found,) = loglikelihood(llm, Question(context, [continuation], samples=2))
    pair = torch.tensor(context), torch.tensor(continuation)
    expected = reference.loglikelihood(oracle.model, *pair, num_samples=2)
    assert found.value == pytest.approx(expected.value, abs=2e-2)
