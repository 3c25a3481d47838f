"""What a request may not ask for beside its policy, and the options of policies in torch code as workers have them."""

import math
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from vllm_dllm.config import DllmConfig, RequestOptions, parse_server_settings
from vllm_dllm.engine.policy_limits import check_eos, refuse_beside_policy, refuse_structure
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.engine.request import resolve_params
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.registry import BUILT_IN, NATIVE, changes_tokens
from vllm_dllm.unmask.schedule import UnmaskRules

EOS = 7


def resolve(settings: DllmConfig, **options: Any) -> RequestParams:
    params = SamplingParams(max_tokens=20, extra_args={f"dllm_{name}": value for name, value in options.items()})
    rules = UnmaskRules(eos_id=EOS)
    return resolve_params(params, request_id="a", prompt_len=10, settings=settings, rules=rules, max_model_len=100)


def test_a_policys_parameters_are_the_requests_the_servers_or_published() -> None:
    settings = parse_server_settings({"policy": "local_leap", "local_leap_relaxed": 0.5, "block_length": 8})
    served = resolve(settings)
    assert (served.own_policy, served.own_values, served.request_id) == ("local_leap", (0.5, 4.0), "a")
    asked = resolve(settings, local_leap_radius=2, threshold=0.6)
    assert (asked.own_values, asked.threshold) == ((0.5, 2.0), 0.6)
    other = resolve(settings, policy="saber")
    assert (other.own_policy, other.own_values) == ("saber", (2.0,))
    native = resolve(settings, policy="threshold")
    assert (native.own_policy, native.own_values) == (None, ())


def test_a_policy_that_takes_tokens_back_takes_no_draws_words_or_structure() -> None:
    changing = {"saber", "rcr", "remdm", "editing"}
    for policy in changing:
        refuse_beside_policy(SamplingParams(temperature=0), policy)
        with pytest.raises(
            RequestError, match=rf"temperature is 0\.5, but the request's policy '{policy}' takes tokens"
        ):
            refuse_beside_policy(SamplingParams(temperature=0.5), policy)
        with pytest.raises(RequestError, match=r"bad_words is \['no'\].* allowed is none; remove it"):
            refuse_beside_policy(SamplingParams(temperature=0, bad_words=["no"]), policy)
        with pytest.raises(RequestError, match=rf"structured_outputs is set, .* '{policy}' changes tokens"):
            refuse_structure(policy, RequestOptions())
    assert {name for name in (*NATIVE, *BUILT_IN) if changes_tokens(name)} == changing
    for policy in {*NATIVE, *BUILT_IN} - changing:
        refuse_structure(policy, RequestOptions())
        refuse_beside_policy(SamplingParams(temperature=0.5, bad_words=["no"]), policy)


def test_eos_may_be_left_out() -> None:
    assert resolve(DllmConfig(), logits_eos_inf=True).edits.bias == ((EOS, -math.inf),)
    assert resolve(DllmConfig()).edits.bias == ()
    never = RequestOptions(logits_eos_inf=True)
    check_eos(SamplingParams(allowed_token_ids=[EOS, 3]), never, EOS)
    check_eos(SamplingParams(allowed_token_ids=[EOS]), RequestOptions(), EOS)
    with pytest.raises(
        RequestError, match=r"dllm_logits_eos_inf is true, but allowed_token_ids is \[7\], the EOS alone"
    ):
        check_eos(SamplingParams(allowed_token_ids=[EOS]), never, EOS)
    with pytest.raises(RequestError, match="dllm_logits_eos_inf is true beside structured output"):
        refuse_structure("static", never)
