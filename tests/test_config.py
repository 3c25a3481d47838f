"""Settings of a server and options of a request: what is read, what is refused, and in which words."""

from typing import get_args

import numpy as np
import pytest

from vllm_dllm.blocks import max_prompt_len, row_blocks
from vllm_dllm.config import (
    DllmConfig,
    InvalidOptionError,
    RequestOptions,
    parse_request_options,
    parse_server_settings,
)
from vllm_dllm.names import PolicyName
from vllm_dllm.policy_options import POLICY_ALIASES
from vllm_dllm.request_checks import check_policy_options, request_steps


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
            ["additional_config.dllm.policy is 'best'", "allowed are 'static', 'random', 'threshold', 'factor', 'marg"],
        ),
        ({"threshold": float("nan")}, ["additional_config.dllm.threshold is nan"]),
        ({"factor": float("inf")}, ["additional_config.dllm.factor is inf"]),
        ({"refresh_every": 0}, ["additional_config.dllm.refresh_every is 0"]),
        ({"kv_policy": "prefix", "refresh_every": 3}, ["refresh_every is 3 but kv_policy is 'prefix'", "leave"]),
        ({"kv_policy": "freecache", "refresh_every": 3}, ["kv_policy is 'freecache', which keeps what precedes"]),
        ({"kv_policy": "vicinity", "refresh_every": 3}, ["kv_policy is 'vicinity', which computes all K/V anew when"]),
        ({"kv_policy": "dkv", "refresh_every": 0}, ["additional_config.dllm.refresh_every is 0"]),
        (
            {"cfg_scale": 1.5},
            ["cfg_scale is 1.5 but kv_policy is 'dual' with refresh_every None", "refresh_every to 1"],
        ),
        ({"kv_policy": "freecache", "cfg_scale": 0}, ["cfg_scale is 0.0 but kv_policy is 'freecache'"]),
        ({"refresh_every": 1, "cfg_scale": -1}, ["additional_config.dllm.cfg_scale is -1", "from 0 to 100"]),
        ({"prefix_look": 16}, ["prefix_look is 16 but kv_policy is 'dual'", "set kv_policy to 'vicinity'"]),
        ({"kv_policy": "freecache", "after_look": 0}, ["after_look is 0 but kv_policy is 'freecache'"]),
        ({"kv_policy": "prefix", "warmup_steps": 4}, ["warmup_steps is 4 but kv_policy is 'prefix'"]),
        ({"kv_policy": "vicinity", "after_look": -1}, ["additional_config.dllm.after_look is -1", "from 0 on"]),
        ({"kv_policy": "block_causal", "refresh_every": 3}, ["kv_policy is 'block_causal', which never computes K/V"]),
        ({"block_length": 8, "steps_per_block": 9}, ["steps_per_block is 9 but block_length is 8", "1..8"]),
        (
            {"block_length": 8, "steps_per_block": 3, "policy": "dynamic"},
            ["steps_per_block is 3, but policy 'dynamic'", "divisor"],
        ),
        ({"credit_beta": 1.5}, ["additional_config.dllm.credit_beta is 1.5", "allowed are numbers from 0 to 1"]),
        (
            {"credit_alpha": 101},
            ["additional_config.dllm.credit_alpha is 101", "allowed are numbers above 0 and up to 100"],
        ),
        ({"entropy_bound": 0}, ["additional_config.dllm.entropy_bound is 0", "finite numbers above 0"]),
        ({"alg_temp": -1.0}, ["additional_config.dllm.alg_temp is -1.0", "null and finite numbers from 0 on"]),
        (
            {"attention": "fast"},
            ["additional_config.dllm.attention is 'fast'", "'auto', 'csrc', 'vllm', 'flashinfer', 'xformers'"],
        ),
        ({"horizon": 0}, ["additional_config.dllm.horizon is 0", "null and whole numbers from 1 to 1048576"]),
        ([], ["additional_config.dllm is []", "block_length", "local_leap_radius", "learn2pd_file"]),
        (
            {"local_leap_radus": 4},
            ["learn2pd_file", "did you mean 'additional_config.dllm.local_leap_radius'"],
        ),
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
        ({"block_length": 8, "steps_per_block": 9}, "--steps-per-block is 9 but --block-length is 8"),
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
    with pytest.raises(InvalidOptionError, match=r"dllm_policy is 'greedy', allowed are 'static', .*'low_confidence'"):
        parse_request_options({"dllm_policy": "greedy"})


@pytest.mark.parametrize(
    ("options", "policy"),
    [({"threshold": 0.5}, "static"), ({"steps": 4}, "threshold"), ({"policy": "random", "factor": 1.0}, "factor")],
)
def test_options_that_the_policy_ignores_are_refused(options: dict[str, object], policy: str) -> None:
    with pytest.raises(InvalidOptionError, match="does not use it; allowed is dllm_"):
        check_policy_options(RequestOptions(**options), DllmConfig(policy=policy))  # type: ignore[arg-type]


def test_a_horizon_fits_positions() -> None:
    with pytest.raises(InvalidOptionError, match="dllm_horizon is 288230376151711744, allowed are null and"):
        parse_request_options({"dllm_horizon": 1 << 58})


def test_a_horizon_is_for_models_that_see_masks_behind() -> None:
    check_policy_options(RequestOptions(horizon=2), DllmConfig())
    with pytest.raises(InvalidOptionError, match="dllm_horizon is 2, but kv_policy is 'freecache', and sequences"):
        check_policy_options(RequestOptions(horizon=2), DllmConfig(kv_policy="freecache"))
    with pytest.raises(InvalidOptionError, match=r"^additional_config\.dllm: horizon is 1, but kv_policy is 'causal'"):
        parse_server_settings({"horizon": 1}, defaults={"kv_policy": "causal"})


def test_options_of_the_servers_policy_pass() -> None:
    check_policy_options(RequestOptions(threshold=0.5), DllmConfig(policy="threshold"))


def test_the_models_values_stand_where_the_user_gives_none() -> None:
    defaults = {"block_length": 4, "policy": "dynamic", "threshold": 0.85}
    settings = parse_server_settings({"policy": "static", "block_length": 16}, defaults=defaults)
    assert (settings.block_length, settings.policy, settings.threshold) == (16, "static", 0.85)
    assert parse_server_settings({}, defaults=defaults).block_length == 4


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "expected"),
    [(10, 1, 18), (10, 8, 18), (10, 9, 26), (10, 1000, 98), (92, 8, 100), (93, 8, 93), (150, 8, 150)],
)
def test_blocks_begin_behind_the_prompt_and_fit(prompt_len: int, max_tokens: int, expected: int) -> None:
    blocks = row_blocks(prompt_len, max_tokens, DllmConfig(block_length=8), max_model_len=100)
    assert (blocks.begin, blocks.end, len(blocks)) == (prompt_len, expected, (expected - prompt_len) // 8)


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "begin", "end"),
    [
        (10, 1, 8, 16),
        (10, 6, 8, 16),
        (10, 7, 8, 24),
        (16, 1, 16, 24),
        (10, 99, 8, 88),
        (84, 1, 80, 88),
        (85, 1, 80, 80),
    ],
)
def test_aligned_blocks_leave_room_for_one_more(prompt_len: int, max_tokens: int, begin: int, end: int) -> None:
    settings = DllmConfig(block_length=8, kv_policy="block_causal")
    blocks = row_blocks(prompt_len, max_tokens, settings, max_model_len=100)
    assert (blocks.begin, blocks.end) == (begin, end)
    assert max_prompt_len(settings, 100) == 84


@pytest.mark.parametrize("kv_policy", ["dual", "block_causal"])
@pytest.mark.parametrize("block_length", [1, 3, 8])
def test_the_longest_prompt_leaves_a_block_and_no_more(kv_policy: str, block_length: int) -> None:
    settings = DllmConfig(block_length=block_length, kv_policy=kv_policy)  # type: ignore[arg-type]  # one of the literals
    for max_model_len in range(2 * block_length + 1, 40):
        longest = max_prompt_len(settings, max_model_len)
        lengths = [len(row_blocks(longest + more, 1, settings, max_model_len)) for more in (0, 1)]
        assert lengths == [1, 0]


def test_steps_are_split_over_blocks() -> None:
    settings = DllmConfig(block_length=16)
    assert request_steps(RequestOptions(steps=8), settings, 64) == 2
    assert request_steps(RequestOptions(steps=8), settings, 50) == 2
    assert request_steps(RequestOptions(), settings, 64) == 16
    for steps in (6, 65, 128):
        with pytest.raises(
            InvalidOptionError, match=f"dllm_steps is {steps}, but max_tokens 64 in 4 blocks of 16 need a multiple of 4"
        ):
            request_steps(RequestOptions(steps=steps), settings, 64)


@pytest.mark.parametrize("alias", POLICY_ALIASES)
def test_a_familys_name_of_a_policy_is_taken_everywhere(alias: str) -> None:
    policy = POLICY_ALIASES[alias]
    assert parse_server_settings({"policy": alias}).policy == policy
    assert parse_request_options({"dllm_policy": alias}).policy == policy
    assert policy in get_args(PolicyName)


def test_numbers_of_numpy_are_numbers() -> None:
    given = {"dllm_steps": np.int64(4), "dllm_threshold": np.float32(0.5), "dllm_factor": np.int32(1)}
    options = parse_request_options(given)
    assert (options.steps, options.threshold, options.factor) == (4, 0.5, 1.0)
    with pytest.raises(InvalidOptionError, match=r"dllm_steps is np\.True_"):
        parse_request_options({"dllm_steps": np.True_})
