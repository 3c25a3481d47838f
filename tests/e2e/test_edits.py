"""Sampling parameters that change logits: engine == reference, in fp32, beside requests without them."""

from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMClientError

from tests.e2e.edited import with_edits
from tests.e2e.logprobs import check_logprobs, run_asking
from tests.e2e.rig import Case, mixed_cases, run, run_outputs, shared_engine, step_all
from vllm_dllm.state.edits import LogitEdits

SETTINGS = {"block_length": 8}
pytestmark = [pytest.mark.engine, pytest.mark.xdist_group(f"llada {SETTINGS}")]


@pytest.fixture
def llm(wild: Path) -> Any:
    return shared_engine(wild, SETTINGS)


def test_mixed_batch_equals_reference(llm: Any, oracle: Any) -> None:
    cases = with_edits(mixed_cases(8, seed=31), seed=1)
    outputs = run_asking(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        oracle.tokens(case, SETTINGS) for case in cases
    ]
    check_logprobs(outputs, [oracle.generation(case, SETTINGS).log_probs for case in cases])


def test_a_preempted_answer_stays_one(llm: Any, oracle: Any) -> None:
    """Its finished blocks come back in the prompt, and are counted as before."""
    edits = LogitEdits(frequency=2.0, presence=1.0, repetition=1.25, min_tokens=30, bad_words=((9,), (8, 8)))
    cases = [Case(prompt=(5, 6, 7 + i), max_tokens=32, seed=i, temperature=0.7, edits=edits) for i in range(3)]

    def preempt(number: int, llm: Any) -> None:
        if number in (11, 21):
            assert llm.llm_engine.engine_core.engine_core.scheduler.running
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    assert step_all(llm, cases, preempt) == {str(i): oracle.tokens(case, SETTINGS) for i, case in enumerate(cases)}


def test_words_are_read_by_the_tokenizer(llm: Any) -> None:
    case, tokenizer = Case(prompt=(5, 6, 7), max_tokens=32), llm.get_tokenizer()
    words = {tokenizer.decode([token]): token for token in run(llm, [case])[0]}
    word, token = next((w, t) for w, t in words.items() if tokenizer.encode(w, add_special_tokens=False) == [t])
    (without,) = run_outputs(llm, [case], bad_words=[word])
    assert token not in without.outputs[0].token_ids
    assert len(without.outputs[0].token_ids) == 32


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"allowed_token_ids": [3]}, "allowed_token_ids is [3], all of which are the mask token"),
        ({"allowed_token_ids": [1, 6], "min_tokens": 2}, "allowed_token_ids is [1, 6], all of which"),
        ({"stop_token_ids": [*range(376)], "min_tokens": 2}, "all 376 tokens of the vocabulary are the mask token"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids contains out-of-vocab"),
        ({"logit_bias": {10**6: 1.0}}, "in logit_bias contain"),
        ({"logit_bias": {7: float("nan")}}, "logit_bias[7] is"),
        ({"logit_bias": {7: -1e300}}, "logit_bias[7] is -1e+300, allowed are numbers from -100 to 100"),
        ({"repetition_penalty": 1e39}, "repetition_penalty is 1e+39, allowed are numbers from 0.01 to 100"),
        ({"min_tokens": 33}, "min_tokens must be less than or equal to max_tokens"),
        (
            {"min_p": 0.1, "temperature": 0.7, "extra_args": {"dllm_policy": "credit"}},
            "min_p is 0.1, but the request's",
        ),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(llm: Any, changes: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, VLLMClientError)) as refused:
        llm.generate([{"prompt_token_ids": [5]}], Case((5,), 16).sampling_params(**changes), use_tqdm=False)
    assert text in str(refused.value)
