"""What a worker takes for the end of an answer is what vLLM's scheduler stops at."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.utils import check_stop

from vllm_dllm.engine import ends
from vllm_dllm.engine.ends import ends_of
from vllm_dllm.state.ends import NO_ENDS, Ends, EndState

EOS, EOT, MASK, PROMPT_LEN = 1, 6, 3, 5


def params(**changes: Any) -> SamplingParams:
    made = SamplingParams(**({"max_tokens": 12} | changes))
    made.update_from_generation_config({"eos_token_id": [EOT]}, EOS)
    return made


def stopped_at(tokens: list[int], asked: SamplingParams) -> int | None:
    """Return after how many tokens vLLM stops."""
    request = SimpleNamespace(sampling_params=asked, pooling_params=None, max_tokens=asked.max_tokens, status=None)
    for count in range(1, len(tokens) + 1):
        request.output_token_ids, request.num_output_tokens = tokens[:count], count
        request.num_tokens = PROMPT_LEN + count
        if check_stop(request, 1000):
            return count
    return None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ignore_eos": True},
        {"stop_token_ids": [9, 8]},
        {"ignore_eos": True, "stop_token_ids": [9]},
        {"min_tokens": 4},
        {"min_tokens": 4, "stop_token_ids": [9]},
        {"max_tokens": 3},
    ],
)
def test_what_ends_an_answer_is_what_vllm_stops_at(changes: dict[str, Any]) -> None:
    asked, rng, state = params(**changes), random.Random(1), EndState(1, torch.device("cpu"))
    state.put(0, ends_of(asked, PROMPT_LEN, "static"))
    state.apply_staged_writes()
    barred = asked.all_stop_token_ids  # what min_tokens keeps away
    reached = 0
    for _ in range(300):
        tokens = [rng.choice([EOS, EOT, 7, 8, 9, 10, 11, 12]) for _ in range(16)]
        tokens[: asked.min_tokens] = [7 if token in barred else token for token in tokens[: asked.min_tokens]]
        num_known = rng.randrange(17)
        canvas = torch.tensor([tokens[:num_known] + [MASK] * (16 - num_known)])
        position = PROMPT_LEN + torch.arange(16)[None]
        is_over = bool(state.reached(torch.tensor([0]), position, canvas, MASK))
        end = stopped_at(tokens, asked)
        assert is_over == (end is not None and end <= num_known)
        reached += is_over
    assert reached > 20


def test_a_policy_that_takes_tokens_back_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "changes_tokens", lambda policy: policy == "static")
    assert ends_of(params(), PROMPT_LEN, "static") == NO_ENDS
    assert ends_of(params(), PROMPT_LEN, "random") != NO_ENDS


def test_many_stop_tokens_are_left_to_the_scheduler() -> None:
    """No request makes the table of all slots as wide as it likes."""
    few = ends_of(params(stop_token_ids=[*range(10, 70)]), PROMPT_LEN, "static")
    many = ends_of(params(stop_token_ids=[*range(10, 10 + ends.MAX_END_IDS)]), PROMPT_LEN, "static")
    assert len(few.ids) == 62
    assert many == Ends((), few.first, few.limit)
