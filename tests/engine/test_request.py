"""A request's parameters, resolved for a worker."""

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine import configs
from vllm_dllm.engine.parameter_types import check_sent
from vllm_dllm.engine.refusals import RequestError, refuse_unsupported
from vllm_dllm.engine.request import check_admission, finish_admission, resolve_params
from vllm_dllm.state.request_params import RequestParams
from vllm_dllm.unmask.policy import POLICY_IDS
from vllm_dllm.unmask.schedule import UnmaskRules

MASK = 3


def resolve(params: SamplingParams, settings: DllmConfig | None = None, request_id: str = "a") -> RequestParams:
    return resolve_params(
        params,
        request_id=request_id,
        prompt_len=10,
        settings=settings or DllmConfig(),
        rules=UnmaskRules(),
        max_model_len=100,
    )


def test_options_override_the_servers_settings() -> None:
    settings = DllmConfig(block_length=8, policy="factor", factor=0.5, threshold=0.8, steps_per_block=2)
    plain = resolve(SamplingParams(max_tokens=20), settings)
    assert (plain.policy_id, plain.factor, plain.counts) == (POLICY_IDS["factor"], 0.5, (4,) * 8)
    assert plain.seq_len == 10 + 24
    own = {"dllm_policy": "static", "dllm_steps": 12}
    assert resolve(SamplingParams(max_tokens=20, extra_args=own), settings).counts == (2,) * 8
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
        refuse_unsupported(SamplingParams(prompt_logprobs=2))
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, VLLMClientError)
    assert refused.value.parameter == "prompt_logprobs"


def test_a_prompt_that_arrives_in_parts_is_refused() -> None:
    """Its row would grow past the pages and positions that were reserved for it."""
    request = admitted([5, 6], resumable=True)
    with pytest.raises(RequestError, match=r"the prompt arrives in parts, allowed are whole prompts"):
        check_admission(request, DllmConfig(block_length=8), 64, MASK)
    assert check_admission(admitted([5, 6]), DllmConfig(block_length=8), 64, MASK) == 8


def admitted(prompt: list[int], *, resumable: bool = False, max_tokens: int = 8, **options: object) -> Any:
    """Return a request of which admission reads this."""
    extra = {f"dllm_{name}": value for name, value in options.items()}
    params = SamplingParams(max_tokens=max_tokens, extra_args=extra)
    nothing = ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
    of_us = {"sampling_params": params, "prompt_token_ids": prompt, "resumable": resumable}
    return EngineCoreRequest(request_id="a", arrival_time=0.0, **of_us, **dict.fromkeys(nothing))


def test_numbers_that_cannot_be_sent_are_told_by_their_names() -> None:
    request = admitted([5] * 8, max_tokens=7)
    request.priority = 2**70
    with pytest.raises(RequestError, match=f"^priority is {2**70}, allowed is what can be sent to the engine"):
        check_sent(request)
    request = admitted([5] * 8, max_tokens=7)
    assert request.sampling_params is not None
    request.sampling_params.stop_token_ids = [2**70]
    with pytest.raises(RequestError, match=r"^stop_token_ids is \[1180"):
        check_sent(request)


ALIGNED = DllmConfig(block_length=8, kv_policy="block_causal")


def test_aligned_blocks_give_what_the_partial_block_leaves() -> None:
    assert check_admission(admitted([5] * 10, max_tokens=1), ALIGNED, 64, MASK) == 6
    assert check_admission(admitted([5] * 10, max_tokens=7), ALIGNED, 64, MASK) == 14
    assert check_admission(admitted([5] * 16, max_tokens=99), ALIGNED, 64, MASK) == 40


@pytest.mark.parametrize(
    ("settings", "prompt", "options", "parameter", "text"),
    [
        (
            DllmConfig(block_length=8),
            [5] * 57,
            {},
            "prompt",
            "a block needs 8 of max_model_len 64; shorten the prompt to at most 56 tokens",
        ),
        (
            ALIGNED,
            [5] * 49,
            {},
            "prompt",
            "as much behind it need 16 of max_model_len 64; shorten the prompt to at most 48 tokens",
        ),
        (
            ALIGNED,
            [5] * 10 + [MASK],
            {},
            "prompt",
            f"the mask token {MASK} at position 10 (from 0), but the block of 8",
        ),
        (
            ALIGNED,
            [5] * 10,
            {"steps": 4, "max_tokens": 17},
            "dllm_steps",
            "dllm_steps is 4, but max_tokens 17 in 3 blocks of 8 need a multiple of 3 between 3 and 24",
        ),
        (ALIGNED, [5] * 10, {"policy": "dynamic", "steps": 3}, "dllm_steps", "3 steps to a block of 8, but 'dynamic'"),
        (
            DllmConfig(block_length=8, steps_per_block=3),
            [5],
            {"policy": "dynamic"},
            "dllm_policy",
            "dllm_policy is 'dynamic', which gives 3 steps to a block of 8",
        ),
        (ALIGNED, [5], {"entropy_bound": 0.5}, "dllm_entropy_bound", "allowed is dllm_steps, dllm_alg_temp; remove"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(
    settings: DllmConfig, prompt: list[int], options: dict[str, Any], parameter: str, text: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(text)) as refused:
        check_admission(admitted(prompt, **options), settings, 64, MASK)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize(("name", "value", "allowed"), [("top_k", 5, "0 or -1"), ("top_p", 0.9, "1")])
def test_filters_of_logits_that_credit_raises_are_refused(name: str, value: float, allowed: str) -> None:
    """By the request's policy or the server's, and not at temperature 0, where nothing is drawn."""
    servers = DllmConfig(block_length=8, policy="credit")
    for settings, options in ((ALIGNED, {"policy": "credit"}), (servers, {})):
        request = admitted([5], **options)  # type: ignore[arg-type]
        assert request.sampling_params is not None
        setattr(request.sampling_params, name, value)
        for temperature, is_refused in ((0.0, False), (0.7, True)):
            request.sampling_params.temperature = temperature
            if not is_refused:
                check_admission(request, settings, 64, MASK)
                continue
            with pytest.raises(
                RequestError, match=rf"{name} is {value}, .* 'credit' .*; allowed is {allowed}; "
            ) as refused:
                check_admission(request, settings, 64, MASK)
            assert refused.value.parameter == name
    request.sampling_params.extra_args = {"dllm_policy": "threshold"}
    check_admission(request, servers, 64, MASK)


def test_the_steps_that_are_taken_do_not_depend_on_the_prompt() -> None:
    """A client knows `max_tokens` and `block_length`, and not how many tokens its prompt has."""
    for prompt_len, settings in itertools.product(range(1, 49), (ALIGNED, DllmConfig(block_length=8))):
        request = admitted([5] * prompt_len, steps=4, max_tokens=9)
        request.sampling_params.max_tokens = min(9, check_admission(request, settings, 64, MASK))
        resolved = resolve_params(
            request.sampling_params,
            request_id="a",
            prompt_len=prompt_len,
            settings=settings,
            rules=UnmaskRules(),
            max_model_len=64,
        )
        per_block = 2 if request.sampling_params.max_tokens == 9 else 4  # the latter where only one block fits
        expected = resolve(SamplingParams(), DllmConfig(block_length=8, steps_per_block=per_block))
        assert resolved.counts == expected.counts, f"a prompt of {prompt_len}"


def test_the_longest_prompt_and_masks_before_the_partial_block_pass() -> None:
    assert check_admission(admitted([5] * 48), ALIGNED, 64, MASK) == 8
    assert check_admission(admitted([MASK] * 8 + [5]), ALIGNED, 64, MASK) == 15
    assert check_admission(admitted([MASK] * 56), DllmConfig(block_length=8), 64, MASK) == 8


def test_positions_are_drawn_under_policies_that_do_so_alone() -> None:
    settings = DllmConfig(block_length=8, policy="entropy", alg_temp=0.5)
    assert resolve(SamplingParams(), settings).alg_temp == 0.5
    assert resolve(SamplingParams(extra_args={"dllm_alg_temp": 0}), settings).alg_temp == 0.0
    assert resolve(SamplingParams(extra_args={"dllm_policy": "random"}), settings).alg_temp == 0.0


def test_what_is_admitted_ends_with_its_blocks_and_at_the_end_of_turn() -> None:
    """The end of text that vLLM knows stays beside it."""
    model = SimpleNamespace(
        architectures=["LLaDAModelLM"],
        hf_config=SimpleNamespace(eot_token_id=9, mask_token_id=MASK),
        max_model_len=64,
        get_vocab_size=lambda: 16,
    )
    config: Any = SimpleNamespace(model_config=model, additional_config={"dllm": {"block_length": 8}})
    config.dllm = configs.parse(config)
    request = admitted([5] * 50, max_tokens=99)
    params = request.sampling_params
    params.update_from_generation_config({}, 1)
    finish_admission(SimpleNamespace(model_config=model, vllm_config=config), request)
    assert params.max_tokens == 8
    assert params.eos_token_id == 1
    assert params.stop_token_ids == [9]


WINDOWS = DllmConfig(block_length=8, kv_policy="causal", mode="self_speculation")


def test_self_speculation_admits_what_fills_the_model_length() -> None:
    assert check_admission(admitted([MASK] * 60, max_tokens=99), WINDOWS, 64, MASK) == 4
    assert check_admission(admitted([5] * 63, max_tokens=99), WINDOWS, 64, MASK) == 1
    with pytest.raises(
        RequestError, match="the prompt has 64 tokens, but a token of the reply needs 1 of max_model_len"
    ):
        check_admission(admitted([5] * 64), WINDOWS, 64, MASK)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"extra_args": {"dllm_policy": "static"}}, "dllm_policy is 'static', but the server's mode is 'self_specul"),
        ({"extra_args": {"dllm_steps": 8}}, "dllm_steps is 8, but the server's mode is 'self_speculation'"),
        ({"min_p": 0.1}, "min_p is 0.1, but the server's mode is 'self_speculation', which verifies drafts without"),
        ({"logit_bias": {5: 1.0}}, "logit_bias is {5: 1.0}, but"),
        ({"presence_penalty": 0.5}, "presence_penalty is 0.5, but"),
    ],
)
def test_self_speculation_refuses_what_it_would_ignore(given: dict[str, Any], message: str) -> None:
    request = admitted([5, 6])
    request.sampling_params = SamplingParams(max_tokens=8, **given)
    with pytest.raises(RequestError, match=re.escape(message)):
        check_admission(request, WINDOWS, 64, MASK)
