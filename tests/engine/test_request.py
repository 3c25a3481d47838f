"""A request's parameters, resolved for a worker."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.request import RequestError, check_admission, refuse_unsupported, resolve_params
from vllm_dllm.state.canvas import RequestParams
from vllm_dllm.unmask.policy import POLICY_IDS


def resolve(params: SamplingParams, settings: DllmConfig | None = None, request_id: str = "a") -> RequestParams:
    return resolve_params(
        params, request_id=request_id, prompt_len=10, settings=settings or DllmConfig(), max_model_len=100
    )


def test_options_override_the_servers_settings() -> None:
    settings = DllmConfig(block_length=8, policy="factor", factor=0.5, threshold=0.8, steps_per_block=2)
    plain = resolve(SamplingParams(max_tokens=20), settings)
    assert (plain.policy_id, plain.factor, plain.steps_per_block) == (POLICY_IDS["factor"], 0.5, 2)
    assert plain.row_len == 10 + 24
    own = {"dllm_policy": "static", "dllm_steps": 12}
    assert resolve(SamplingParams(max_tokens=20, extra_args=own), settings).steps_per_block == 4
    own = {"dllm_policy": "threshold", "dllm_threshold": 0.3}
    assert resolve(SamplingParams(max_tokens=20, extra_args=own), settings).threshold == 0.3


def test_a_missing_seed_follows_from_the_requests_id() -> None:
    seeds = {resolve(SamplingParams(), request_id=name).seed for name in ("a", "b", "a")}
    assert len(seeds) == 2
    assert resolve(SamplingParams(seed=-5)).seed == -5


def test_disabled_top_k_is_zero() -> None:
    assert resolve(SamplingParams(temperature=1.0, top_k=-1)).top_k == 0


def test_a_refusal_is_an_error_of_vllm_and_of_python() -> None:
    from vllm.exceptions import VLLMClientError

    with pytest.raises(RequestError) as refused:
        refuse_unsupported(SamplingParams(logprobs=2))
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, VLLMClientError)
    assert refused.value.parameter == "logprobs"


def test_a_prompt_that_arrives_in_parts_is_refused() -> None:
    """Its row would grow past the pages and positions that were reserved for it."""
    request = SimpleNamespace(sampling_params=SamplingParams(max_tokens=8), prompt_token_ids=[5, 6], resumable=True)
    with pytest.raises(RequestError, match=r"the prompt arrives in parts, allowed are whole prompts"):
        check_admission(request, DllmConfig(block_length=8), 64)  # type: ignore[arg-type]  # what it reads of a request
    request.resumable = False
    assert check_admission(request, DllmConfig(block_length=8), 64) == 8  # type: ignore[arg-type]
