"""Log-probabilities of an engine's tokens beside those of the reference."""

from typing import Any

import torch

from tests.e2e.rig import Case
from tests.unmask.edited import Shown, check_shown

ASKED = (3, None, 0, 20)
"""What the cases of a batch ask for, in turn."""


def run_asking(llm: Any, cases: list[Case]) -> list[Any]:
    """Run cases of which every other one asks for log-probabilities."""
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    params = [case.sampling_params(logprobs=ASKED[i % len(ASKED)]) for i, case in enumerate(cases)]
    return llm.generate(prompts, params, use_tqdm=False)


def shown(output: Any, num_top: int) -> list[Shown]:
    """Return what is shown of a request's tokens."""
    places = []
    for token, place in zip(output.token_ids, output.logprobs, strict=True):
        top = sorted((each.rank, other) for other, each in place.items() if each.rank <= num_top)
        ids = [token, *(other for _, other in top)]
        places.append(Shown(ids, [place[other].logprob for other in ids], place[token].rank))
    return places


def check_logprobs(outputs: list[Any], log_probs: list[torch.Tensor]) -> None:
    """Compare with what each token of each request could have been, [gen_length, vocab]."""
    compared = 0
    for i, (output, expected) in enumerate(zip(outputs, log_probs, strict=True)):
        (own,), num_top = output.outputs, ASKED[i % len(ASKED)]
        if num_top is None:
            assert own.logprobs is None
            continue
        its = shown(own, num_top)
        check_shown(its, list(own.token_ids), expected[: len(its)], num_top, tolerance=2e-3)
        assert abs(own.cumulative_logprob - sum(each.log_probs[0] for each in its)) < 1e-3
        compared += len(its)
    assert compared
