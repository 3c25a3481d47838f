"""Likelihoods by an engine beside those of the reference, and beside requests that are decoded."""

from typing import Any

import pytest
import torch

from tests.e2e.rig import Case, Oracle
from vllm_dllm.engine.scoring import Question, Scoring
from vllm_dllm.reference.loglikelihood import loglikelihood

CONTEXTS = ([5], [9, 14, 8, 77, 23, 41, 60, 11, 35, 92, 18])
CONTINUATIONS = ([7], [1, 44, 6, 44], [30 + (7 * i) % 61 for i in range(19)])
"""One has tokens that end replies, one reaches over several blocks."""


def check_scores(llm: Any, oracle: Oracle, cases: list[Case], expected: list[list[int]]) -> None:
    """Score continuations while cases are decoded; compare both."""
    config, tokenizer = llm.llm_engine.vllm_config, llm.get_tokenizer()
    scorings = [Scoring(Question(each, CONTINUATIONS, samples=5, seed=3), config, tokenizer) for each in CONTEXTS]
    asked = [(scoring, *request) for scoring in scorings for request in scoring.requests()]
    prompts = [{"prompt_token_ids": part.prompt} for _, _, part, _ in asked]
    prompts[1:1] = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    params = [each for *_, each in asked]
    params[1:1] = [case.sampling_params() for case in cases]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs[1 : 1 + len(cases)]] == expected
    for (scoring, i, part, _), output in zip(asked, [outputs[0], *outputs[1 + len(cases) :]], strict=True):
        scoring.take(i, part, output)
        assert output.kv_transfer_params["dllm"]["nfe"] == 1
    for scoring, context in zip(scorings, CONTEXTS, strict=True):
        for found, continuation in zip(scoring.estimates(), CONTINUATIONS, strict=True):
            pair = torch.tensor(context), torch.tensor(continuation)
            wanted = loglikelihood(oracle.model, *pair, num_samples=5, seed=3, rules=oracle.rules)
            assert found.value == pytest.approx(wanted.value, abs=2e-3 * len(continuation))
            assert found.tokens == pytest.approx(wanted.tokens, abs=1e-2)
