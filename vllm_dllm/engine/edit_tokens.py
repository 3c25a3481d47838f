"""What LLaDA2.2 asks of a server and of requests: blocks that experts are chosen for, tokens that delete and insert."""

import reprlib
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from vllm.sampling_params import SamplingParams

from vllm_dllm.config import REQUEST_PREFIX, DllmConfig, InvalidOptionError, RequestOptions
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.policy_options import own_values
from vllm_dllm.unmask.registry import BUILT_IN, torch_policy

_SERVER_PREFIX = "additional_config.dllm."

_TOKENS = ("delete", "split")
"""Parameters of the policies that delete and insert: of those that come with us, a user's may mean others by them."""


def check_server(settings: DllmConfig, hf_config: PretrainedConfig) -> None:
    """Check a server's blocks against those that choose experts together, and its policy's tokens.

    Raises: InvalidOptionError.
    """
    routed = hf_config.block_size if getattr(hf_config, "expert_capacity", None) is not None else None
    if routed is not None and settings.block_length % routed:
        raise InvalidOptionError(
            f"{_SERVER_PREFIX}block_length is {settings.block_length}, but this model chooses experts for blocks of "
            f"{routed} tokens at once (expert_capacity in config.json); allowed are multiples of {routed}; leave "
            "block_length out",
            _SERVER_PREFIX + "block_length",
            settings.block_length,
        )
    problem = _problem(settings.policy, settings.parameters, {}, hf_config)
    if problem:
        raise InvalidOptionError(
            f"{_SERVER_PREFIX}policy is {settings.policy!r}, which {problem}; name them there, or take another policy",
            _SERVER_PREFIX + "policy",
            settings.policy,
        )


def check_request(
    params: SamplingParams, options: RequestOptions, settings: DllmConfig, hf_config: PretrainedConfig
) -> None:
    """Check that a request's policy, if it deletes and inserts, has tokens for it, and that nothing else edits them.

    Raises: RequestError.
    """
    policy = options.policy or settings.policy
    if not _edits(policy):
        return
    problem = _problem(policy, options.parameters, settings.parameters, hf_config)
    if problem:
        raise RequestError(
            f"{REQUEST_PREFIX}policy is {policy!r}, which {problem}; name them, or send another dllm_policy",
            parameter=REQUEST_PREFIX + "policy",
            value=policy,
        )
    usual = SamplingParams()
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids")
    given = {name: (getattr(params, name), getattr(usual, name)) for name in (*names, "min_tokens", "logprobs")}
    scale = settings.cfg_scale if options.cfg_scale is None else options.cfg_scale
    given |= {
        f"{REQUEST_PREFIX}cfg_scale": (scale or None, None),
        f"{REQUEST_PREFIX}logits_eos_inf": (options.logits_eos_inf or None, None),
    }
    for name, (value, allowed) in given.items():
        if value != allowed and value not in ([], {}):
            raise RequestError(
                f"{name} is {reprlib.repr(value)}, but the request's policy {policy!r} also predicts masks, deletions "
                f"and insertions, which it is not made for; allowed is {'null' if allowed is None else allowed}; "
                "remove it, or send another dllm_policy",
                parameter=name,
            )


def _edits(policy: str) -> bool:
    return policy in BUILT_IN and torch_policy(policy).parameters.keys() >= {*_TOKENS}


def _problem(policy: str, given: Mapping[str, float], otherwise: Mapping[str, float], hf_config: Any) -> str | None:
    """Tell what is wrong with the tokens that a policy deletes and inserts by; None: nothing, or it has none."""
    if not _edits(policy):
        return None
    names = list(torch_policy(policy).parameters)
    values = dict(zip(names, own_values(policy, given, otherwise), strict=True))
    ids, mask = {name: int(values[name]) for name in _TOKENS}, int(hf_config.mask_token_id)
    if max(ids.values()) < hf_config.vocab_size and len({*ids.values(), mask}) == 3:
        return None
    shown = " and ".join(f"{policy}_{name} {value}" for name, value in ids.items())
    return (
        f"deletes and inserts by the tokens {shown}, but the vocabulary has {hf_config.vocab_size} tokens and the mask "
        f"is {mask}; allowed are two other ids up to {hf_config.vocab_size - 1}"
    )
