"""Structured output at admission, without an engine: wrong types, and what it cannot stand beside."""

import re
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest

from vllm_dllm.constraint.regex import ConstraintError
from vllm_dllm.engine import configs, structured
from vllm_dllm.engine.parameter_types import check_types
from vllm_dllm.engine.refusals import RequestError
from vllm_dllm.engine.request import finish_admission


def processor(**settings: Any) -> Any:
    """A front end's, as far as admission reads it."""
    model = SimpleNamespace(
        architectures=["LLaDAModelLM"],
        hf_config=SimpleNamespace(eot_token_id=9, eos_token_id=1, mask_token_id=3),
        max_model_len=64,
        get_vocab_size=lambda: 200,
    )
    config: Any = SimpleNamespace(model_config=model, additional_config={"dllm": {"block_length": 8, **settings}})
    config.dllm = configs.parse(config)
    return SimpleNamespace(model_config=model, vllm_config=config, tokenizer=Tokenizer())


class Tokenizer:
    """One over bytes, of two letters, and special tokens from 100 on."""

    backend_tokenizer = SimpleNamespace(decoder="ByteLevel()")
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_ids = range(100, 200)

    def __len__(self) -> int:
        return 200

    def get_vocab(self) -> dict[str, int]:
        return {"a": 5, "b": 6}


def asking(**changes: Any) -> StructuredOutputsParams:
    """Parameters that were changed after vLLM checked them."""
    asked = StructuredOutputsParams(regex="a+")
    for name, value in changes.items():
        setattr(asked, name, value)
    return asked


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["a"], "structured_outputs is ['a'], allowed are None and StructuredOutputsParams; give one of these"),
        ({"regex": "a"}, "structured_outputs is {'regex': 'a'}, allowed are"),
        ({}, "structured_outputs is {}, allowed are"),
        (0, "structured_outputs is 0, allowed are"),
        (asking(regex=5), "structured_outputs.regex is 5, allowed are text and None"),
        (asking(json=[1]), "structured_outputs.json is [1], allowed are text and objects and None"),
        (asking(choice="ab"), "structured_outputs.choice is 'ab', allowed are lists of text and None"),
        (asking(choice=["a", 5]), "structured_outputs.choice is ['a', 5], allowed are lists of text and None"),
        (asking(json_object="x"), "structured_outputs.json_object is 'x', allowed are True and False and None"),
        (asking(grammar=5), "structured_outputs.grammar is 5, allowed are"),
        (asking(structural_tag={}), "structured_outputs.structural_tag is {}, allowed are"),
        (asking(whitespace_pattern=5), "structured_outputs.whitespace_pattern is 5, allowed are"),
        (asking(disable_any_whitespace="x"), "structured_outputs.disable_any_whitespace is 'x', allowed are"),
        (asking(disable_additional_properties=1), "structured_outputs.disable_additional_properties is 1, allowed"),
    ],
)
def test_wrong_types_are_refused_by_their_names(asked: Any, message: str) -> None:
    params = SamplingParams()
    params.structured_outputs = asked
    with pytest.raises(RequestError, match="^" + re.escape(message)):
        check_types(processor(), params)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"allowed_token_ids": [5]}, {}, "allowed_token_ids is [5] beside structured output, and both forbid tokens"),
        ({"bad_words": ["a"]}, {}, "bad_words is ['a'] beside structured output"),
        ({"min_tokens": 2}, {}, "min_tokens is 2 beside structured output"),
        (
            {},
            {"kv_policy": "causal", "mode": "self_speculation"},
            "structured_outputs is set, or response_format or a forced tool, but the server's mode is 'self_speculat",
        ),
    ],
)
def test_what_structure_cannot_stand_beside_is_refused(
    given: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    params = SamplingParams(max_tokens=8, **given)
    params._bad_words_token_ids = [[7]] if params.bad_words else None
    nothing = ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
    known: dict[str, Any] = {"request_id": "a", "arrival_time": 0.0, "prompt_token_ids": [5], "sampling_params": params}
    request = EngineCoreRequest(**known, **dict.fromkeys(nothing))
    with pytest.raises(RequestError, match="^" + re.escape(message)):
        finish_admission(processor(**settings), request, StructuredOutputsParams(regex="a+"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"choice": []}, "choice is [], allowed are lists of one text and more; give one"),
        ({"json": "{"}, "'{' is no JSON (Expecting property name"),
        ({"json": {"enum": {5}}}, "json cannot be written as JSON (Object of type set is not JSON serializable)"),
        ({"regex": "c"}, "no text of this model's tokens meets it; loosen it"),
        (
            {"json_object": True, "whitespace_pattern": "x"},
            "whitespace_pattern is 'x', which matches more than white space of JSON; allowed are expressions of blanks",
        ),
        (
            {"json_object": True, "whitespace_pattern": "("},
            "whitespace_pattern is '(', and it is no regular expression",
        ),
    ],
)
def test_what_cannot_be_enforced_says_what_is_allowed(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as refused:
        structured.put_in(processor(), SamplingParams(max_tokens=8), StructuredOutputsParams(**asked))
    assert refused.value.parameter == "structured_outputs"


def test_a_tokenizer_that_cannot_be_compiled_for_is_told() -> None:
    for tokenizer, message in [
        (None, "start the server without --skip-tokenizer-init"),
        (object(), "serve a model whose tokenizer is byte-level BPE"),
    ]:
        own = SimpleNamespace(tokenizer=tokenizer, model_config=processor().model_config)
        with pytest.raises(ConstraintError, match=message):
            structured._vocabulary(own, (1,)) if tokenizer is None else structured._texts(tokenizer)


def test_stop_tokens_of_requests_leave_a_bounded_number_of_tables() -> None:
    own = processor()
    for token in range(100, 130):
        params = SamplingParams(max_tokens=8, stop_token_ids=[token])
        structured.put_in(own, params, StructuredOutputsParams(regex="a+"))
        tokens = structured.answer_of(params, SimpleNamespace(prompt_len=0, seq_len=8, pins=None), [], 0, 8).automaton  # type: ignore[arg-type,union-attr]
        assert tokens.class_of[token] == tokens.end_class
    assert len(structured._token_bytes) <= 16
