"""What LLaDA2.2 refuses: blocks that cut those which choose experts, tokens that it has not, and what edits logits."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from vllm_dllm.config import InvalidOptionError, RequestOptions, parse_server_settings
from vllm_dllm.engine.edit_tokens import check_request, check_server
from vllm_dllm.engine.refusals import RequestError

IDS = {"indel_delete": 6, "indel_split": 7}


def model(**changes: Any) -> Any:
    return SimpleNamespace(**{"vocab_size": 60, "mask_token_id": 3, "expert_capacity": 4, "block_size": 4, **changes})


@pytest.mark.parametrize("block_length", [2, 6, 33])
def test_blocks_that_cut_those_of_experts_are_refused(block_length: int) -> None:
    settings = parse_server_settings({"block_length": block_length})
    with pytest.raises(
        InvalidOptionError, match=rf"^additional_config\.dllm\.block_length is {block_length}, .* allowed are multiples"
    ):
        check_server(settings, model())
    check_server(settings, model(expert_capacity=None))
    check_server(settings, SimpleNamespace())
    check_server(parse_server_settings({"block_length": 32}), model())


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ({}, "156930 and indel_split 156931"),
        ({"indel_delete": 6, "indel_split": 60}, "6 and indel_split 60"),
        ({"indel_delete": 3, "indel_split": 7}, "3 and indel_split 7"),
        ({"indel_delete": 7, "indel_split": 7}, "7 and indel_split 7"),
    ],
)
def test_tokens_that_the_vocabulary_has_not_are_refused(ids: dict[str, int], shown: str) -> None:
    told = (
        rf"policy is 'indel', which deletes and inserts by the tokens indel_delete {shown}, .* 60 tokens .* mask is 3"
    )
    with pytest.raises(InvalidOptionError, match=told):
        check_server(parse_server_settings({"policy": "indel", **ids}), model())
    plain, greedy = parse_server_settings({}), SamplingParams(temperature=0)
    with pytest.raises(RequestError, match=told):
        check_request(greedy, RequestOptions(policy="indel", **ids), plain, model())
    served = parse_server_settings({"policy": "indel", **IDS})
    check_server(served, model())
    check_request(greedy, RequestOptions(), served, model())
    check_request(greedy, RequestOptions(policy="indel"), parse_server_settings(IDS), model())


@pytest.mark.parametrize(
    "given",
    [
        *({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}, {"logit_bias": {5: 1.0}}),
        *({"allowed_token_ids": [5]}, {"min_tokens": 2}, {"logprobs": 1}),
        *({"dllm_logits_eos_inf": True}, {"dllm_cfg_scale": 1.0}),
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_edits_logits_or_shows_them_is_refused_beside_it(given: dict[str, Any]) -> None:
    settings, [(name, value)] = parse_server_settings({"policy": "indel", **IDS}), given.items()
    own, options = ({}, {name.removeprefix("dllm_"): value}) if name.startswith("dllm_") else (given, {})
    params = SamplingParams(temperature=0, max_tokens=9, **own)
    with pytest.raises(RequestError, match=rf"^{name} is .*'indel' also predicts masks, .* allowed is .*; remove it"):
        check_request(params, RequestOptions(**options), settings, model())
    check_request(params, RequestOptions(policy="editing", **options), settings, model())


def test_whatever_changes_nothing_is_taken() -> None:
    settings = parse_server_settings({"policy": "indel", **IDS})
    params = SamplingParams(temperature=0, logit_bias={}, min_tokens=0, presence_penalty=0)
    check_request(params, RequestOptions(cfg_scale=0.0), settings, model())
