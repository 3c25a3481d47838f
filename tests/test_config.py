"""Settings of a server and options of a request: what is read, what is refused, and in which words."""

import pytest

from vllm_dllm.config import (
    DllmConfig,
    InvalidOptionError,
    RequestOptions,
    check_policy_options,
    generation_length,
    parse_request_options,
    parse_server_settings,
    split_steps,
)


def test_defaults() -> None:
    settings = parse_server_settings({})
    assert (settings.block_length, settings.policy, settings.kv_policy) == (32, "static", "dual")
    assert (settings.threshold, settings.factor, settings.steps_per_block, settings.refresh_every) == (
        0.9,
        1,
        None,
        None,
    )


def test_whole_numbers_serve_as_floats() -> None:
    assert parse_server_settings({"threshold": 1}).threshold == 1.0
    assert parse_request_options({"dllm_factor": 2}).factor == 2.0


def test_keys_of_others_are_left_alone() -> None:
    assert parse_request_options({"kv_transfer_params": {}, "dllm_policy": "factor"}) == RequestOptions(policy="factor")
    assert parse_request_options(None) == RequestOptions()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"block_size": 8}, ["additional_config.dllm.block_size is not known", "additional_config.dllm.block_length"]),
        ({"block_length": 0}, ["additional_config.dllm.block_length is 0", "from 1 to 1024"]),
        ({"block_length": True}, ["additional_config.dllm.block_length is True", "whole numbers"]),
        (
            {"policy": "best"},
            ["additional_config.dllm.policy is 'best'", "allowed are 'static', 'random', 'threshold' and 'factor'"],
        ),
        ({"threshold": float("nan")}, ["additional_config.dllm.threshold is nan"]),
        ({"factor": float("inf")}, ["additional_config.dllm.factor is inf"]),
        ({"refresh_every": 0}, ["additional_config.dllm.refresh_every is 0"]),
        ({"kv_policy": "prefix", "refresh_every": 3}, ["refresh_every is 3 but kv_policy is 'prefix'", "leave"]),
        ({"block_length": 8, "steps_per_block": 9}, ["steps_per_block is 9 but block_length is 8", "1..8"]),
        (
            {"attention": "fast"},
            ["additional_config.dllm.attention is 'fast'", "'auto', 'csrc', 'flashinfer', 'xformers'"],
        ),
        ([], ["additional_config.dllm is []", "block_length"]),
    ],
)
def test_server_settings_are_refused_by_name(settings: object, parts: list[str]) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        parse_server_settings(settings)
    assert all(part in str(refused.value) for part in parts), str(refused.value)


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        ({"threshold": 2.0}, "--threshold is 2.0, allowed"),
        ({"block_length": 0}, "--block-length is 0, allowed"),
        ({"block_length": 8, "steps_per_block": 9}, "steps_per_block is 9 but block_length is 8"),
    ],
)
def test_settings_given_as_options_are_refused_as_options(settings: object, begin: str) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        parse_server_settings(settings, prefix="--")
    assert str(refused.value).startswith(begin)


def test_request_options_are_refused_by_the_users_name() -> None:
    with pytest.raises(InvalidOptionError) as refused:
        parse_request_options({"dllm_threshold": "high"})
    assert (refused.value.parameter, refused.value.value) == ("dllm_threshold", "high")


@pytest.mark.parametrize(
    ("options", "policy"),
    [({"threshold": 0.5}, "static"), ({"steps": 4}, "threshold"), ({"policy": "random", "factor": 1.0}, "factor")],
)
def test_options_that_the_policy_ignores_are_refused(options: dict[str, object], policy: str) -> None:
    with pytest.raises(InvalidOptionError, match="does not use it; allowed is dllm_"):
        check_policy_options(RequestOptions(**options), DllmConfig(policy=policy))  # type: ignore[arg-type]


def test_options_of_the_servers_policy_pass() -> None:
    check_policy_options(RequestOptions(threshold=0.5), DllmConfig(policy="threshold"))


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "expected"),
    [(10, 1, 8), (10, 8, 8), (10, 9, 16), (10, 1000, 88), (92, 8, 8), (93, 8, 0), (150, 8, 0)],
)
def test_generation_is_whole_blocks_that_fit(prompt_len: int, max_tokens: int, expected: int) -> None:
    assert generation_length(prompt_len, max_tokens, block_length=8, max_model_len=100) == expected


def test_steps_are_split_over_blocks() -> None:
    assert split_steps(8, gen_length=64, block_length=16) == 2
    for steps in (6, 65, 128):
        with pytest.raises(
            ValueError, match=f"steps is {steps}, but 64 positions in 4 blocks of 16 need a multiple of 4"
        ):
            split_steps(steps, gen_length=64, block_length=16)
