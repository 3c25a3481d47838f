"""Start-up refuses what cannot work, in one sentence; offline refusals are ValueErrors."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.e2e.rig import CHECKPOINT, Case, run, shared_engine

SETTINGS = {"block_length": 8}
pytestmark = pytest.mark.xdist_group(f"llada {SETTINGS}")

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline_parallel_size is 2"),
    ({"enable_prefix_caching": True}, "enable_prefix_caching is on"),
    ({"enable_chunked_prefill": True}, "enable_chunked_prefill is on"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "others than 'spiffy' draft left to"),
    ({"speculative_config": "gone.json"}, "speculative_config is 'gone.json', but there is no such file"),
    ({"speculative_config": {"method": "spiffy", "budget": 99}}, "speculative_config.budget is 99, allowed are 'auto'"),
    ({"speculative_config": {"method": "spiffy", "draft_graph": "gone.json"}}, "gone.json is not a file"),
    (
        {"speculative_config": {"method": "spiffy"}, "additional_config": {"dllm": {"kv_policy": "prefix"}}},
        "speculative_config.exactness is 'exact', but additional_config.dllm.kv_policy is 'prefix'",
    ),
    ({"diffusion_config": {"canvas_length": 16}}, "diffusion_config is {'canvas_length': 16}"),
    ({"long_prefill_token_threshold": 16}, "long_prefill_token_threshold is 16"),
    ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls is set"),
    ({"logprobs_mode": "processed_logits"}, "logprobs_mode is 'processed_logits', but diffusion models give"),
    ({"runner": "pooling", "convert": "embed"}, "runner is 'pooling'"),
    ({"kv_offloading_size": 1.0}, "kv_offloading_size is 1.0"),
    ({"attention_backend": "FLASH_ATTN"}, "attention_backend is FLASH_ATTN"),
    ({"additional_config": {"dllm": {"refresh_every": 33}}}, "refresh_every is 33 but a block of 32"),
    ({"max_num_scheduled_tokens": 64}, "max_num_scheduled_tokens is 64"),
    ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "context parallelism is on"),
    ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill is on"),
    ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer_config is set"),
    ({"enable_trace_replay": True}, "sampling replay is on"),
    ({"enable_prompt_embeds": True}, "prompt embeddings are on"),
    ({"logits_processors": ["a:B"]}, "logits_processors are set"),
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is"),
    ({"quantization": "fp8"}, "quantization is 'fp8', but vLLM has no kernel that makes fp8 of weights on"),
    ({"max_model_len": 32}, "block_length is 32, but max_model_len is 32"),
    ({"additional_config": {"dllm": {"block_len": 8}}}, "additional_config.dllm.block_len is not known; allowed are"),
    ({"additional_config": {"dllm": {"block_length": "8"}}}, "additional_config.dllm.block_length is '8'"),
    ({"additional_config": {"dllm": {"kv_policy": "triple"}}}, "additional_config.dllm.kv_policy is 'triple'"),
    ({"additional_config": {"dllm": {"kv_policy": "prefix", "refresh_every": 2}}}, "refresh_every is 2 but kv_policy"),
    ({"additional_config": {"dllm": {"steps_per_block": 40}}}, "steps_per_block is 40 but block_length is 32"),
    (
        {"additional_config": {"dllm": {"attention": "flashinfer"}}},
        "additional_config.dllm.attention is 'flashinfer', but it does not run on cpu",
    ),
    ({"additional_config": {"dllm": {"attention": "sdpa"}}}, "additional_config.dllm.attention is 'sdpa', allowed are"),
    (
        {"additional_config": {"dllm": {"attention": "csrc"}}, "dtype": "float32", "kv_cache_dtype": "bfloat16"},
        "additional_config.dllm.attention is 'csrc', but kv_cache_dtype bfloat16 is not the model's float32; change",
    ),
    (
        {"additional_config": {"dllm": {"attention": "csrc"}}, "block_size": 512},
        "additional_config.dllm.attention is 'csrc', but it does not take pages of 512 positions (--block-size)",
    ),
    ({"override_generation_config": {"min_p": 1.5}}, "override_generation_config.min_p is 1.5, but requests without"),
    ({"additional_config": {"dllm": 8}}, "additional_config.dllm is 8, allowed is an object"),
]


@pytest.mark.engine
@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[sentence[:32] for _, sentence in REFUSED])
def test_start_is_refused_with_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    from vllm import EngineArgs

    values = {"model": str(CHECKPOINT), "max_model_len": 128, "load_format": "dummy"}
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the sentence is compared below
        EngineArgs(**(values | changes)).create_engine_config()
    assert sentence in str(refused.value)
    assert "ArgsKwargs" not in str(refused.value)


@pytest.mark.engine
@pytest.mark.parametrize("changes", [{}, {"max_num_seqs": 200}])
def test_a_token_budget_that_vllm_finds_too_small_is_raised(changes: dict[str, Any]) -> None:
    from vllm import EngineArgs

    values = {"model": str(CHECKPOINT), "max_model_len": 128, "load_format": "dummy", "max_num_batched_tokens": 64}
    config = EngineArgs(**(values | changes)).create_engine_config().scheduler_config
    assert config.max_num_batched_tokens == 128 + 32 * config.max_num_seqs


@pytest.mark.engine
def test_a_checkpoints_own_penalty_is_left_out(tmp_path: Path) -> None:
    from vllm import EngineArgs

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)
    (checkpoint / "generation_config.json").write_text('{"repetition_penalty": -1, "temperature": 0.5}')
    config = EngineArgs(model=str(checkpoint), max_model_len=128, load_format="dummy").create_engine_config()
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.5, "max_tokens": 128}


@pytest.fixture
def llm(wild: Path) -> Any:
    return shared_engine(wild, SETTINGS)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprobs": 21}, "logprobs is 21, allowed are null and whole numbers from 0 to 20"),
        ({"logprobs": -1}, "logprobs is -1, allowed are null and whole numbers from 0 to 20"),
        ({"prompt_logprobs": 0}, "prompt_logprobs is 0"),
        ({"seed": 2**63}, "64-bit signed"),
        ({"extra_args": {"dllm_steps": True}}, "dllm_steps is True"),
        ({"extra_args": {"dllm_threshold": float("nan")}}, "dllm_threshold is nan"),
        ({"seed": True}, "seed is True, allowed are whole numbers"),
        ({"seed": 1.5}, "seed is 1.5, allowed are whole numbers"),
        ({"extra_args": {1: 2}}, "extra_args is {1: 2}, allowed are objects"),
        ({"extra_args": 3}, "extra_args is 3, allowed are objects"),
        ({"extra_args": {"dllm_policy": None, "dllm_nonsense": 1}}, "dllm_nonsense is not known"),
    ],
)
def test_offline_refusals_are_value_errors(llm: Any, changes: dict[str, Any], message: str) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=16)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is compared below
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], case.sampling_params(**changes), use_tqdm=False)
    assert message in str(refused.value)
    assert len(run(llm, [case])[0]) == 16


@pytest.mark.engine
def test_beams_are_refused(llm: Any) -> None:
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(
        ValueError, match=r"logprobs is 4 for a beam of LLM\.beam_search, which grows answers from left"
    ):
        llm.beam_search([{"prompt_token_ids": [5, 6, 7]}], BeamSearchParams(beam_width=2, max_tokens=8))


WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("ignore_eos", "x", "True and False"),
    ("ignore_eos", None, "True and False"),
    ("ignore_eos", np.True_, "True and False"),
    *((name, 1, "True and False") for name in ("detokenize", "include_stop_str_in_output", "flat_logprobs")),
    *((name, 0, "True and False") for name in ("skip_special_tokens", "spaces_between_special_tokens")),
    ("skip_reading_prefix_cache", 1, "True and False and None"),
    *((name, True, "numbers") for name in ("temperature", "top_p")),
    *((name, value, "numbers") for name, value in [("temperature", "0"), ("temperature", None), ("top_p", "x")]),
    *((name, value, "whole numbers") for name in ("n", "top_k") for value in (True, "x", 1.5, None)),
    *((name, 0, "whole numbers from 1 on") for name in ("n", "max_tokens")),
    ("stop", [5], "text and lists of text and None"),
    ("stop", ("a",), "text and lists of text and None"),
    ("stop_token_ids", "a", "lists of whole numbers and None"),
    ("stop_token_ids", [1.5], "lists of whole numbers and None"),
    ("extra_args", [], "objects and None"),
]
"""Values that a parameter may be changed to after vLLM checked it, and what is allowed."""


@pytest.mark.engine
@pytest.mark.parametrize(("name", "value", "allowed"), WRONG_TYPES, ids=[f"{n} {v!r}" for n, v, _ in WRONG_TYPES])
def test_a_parameter_of_a_wrong_type_is_refused_before_it_reaches_the_engine(
    llm: Any, name: str, value: Any, allowed: str
) -> None:
    params = Case(prompt=(5, 6, 7), max_tokens=4).sampling_params()
    setattr(params, name, value)
    with pytest.raises(ValueError, match="^" + re.escape(f"{name} is {value!r}, allowed are {allowed}")):
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)


@pytest.mark.engine
@pytest.mark.parametrize("value", [object(), np.array([1]), [np.int64(1)], {"a": {1j}}])
def test_options_that_cannot_be_sent_to_the_engine_are_refused(llm: Any, value: object) -> None:
    params = Case(prompt=(5, 6, 7), max_tokens=4).sampling_params(extra_args={"x": value})
    with pytest.raises(ValueError, match=r"^x is .*, allowed are numbers, text, and lists and objects of these"):
        llm.generate([{"prompt_token_ids": [5]}], params, use_tqdm=False)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ({"cache_salt": 5}, {}, "cache_salt is 5, allowed is str | null"),
        ({}, {"priority": ["x"]}, "priority is 'x', allowed is int"),
        ({}, {"priority": [None]}, "priority is None, allowed is int"),
    ],
)
def test_what_the_engine_would_not_decode_of_a_request_is_refused(
    llm: Any, prompt: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    params = Case(prompt=(5, 6, 7), max_tokens=4).sampling_params()
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        llm.generate([{"prompt_token_ids": [5], **prompt}], params, use_tqdm=False, **options)


@pytest.mark.engine
def test_options_of_others_pass(llm: Any) -> None:
    extra = {"dllm_policy": np.str_("static"), "x": [1, "a", None, {"b": True}], "y": np.float32(0.5)}
    params = Case(prompt=(5, 6, 7), max_tokens=4).sampling_params(extra_args=extra)
    assert len(llm.generate([{"prompt_token_ids": [5]}], params, use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_what_passes_is_what_the_engine_decodes() -> None:
    """The types are those of vLLM's own decoder, whose error would end the thread that reads requests."""
    import msgspec
    from vllm.sampling_params import SamplingParams
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from vllm_dllm.engine.parameter_types import check_types

    ours: Any = SimpleNamespace(model_config=SimpleNamespace(architectures=["LLaDAModelLM"]))
    sent = MsgpackEncoder().encode(SamplingParams(stop=["a"], stop_token_ids=[5], seed=3, extra_args={"a": [1, "b"]}))
    params = MsgpackDecoder(SamplingParams).decode(sent)
    check_types(ours, params)
    params.ignore_eos = "x"
    with pytest.raises(msgspec.ValidationError, match="ignore_eos"):
        MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    with pytest.raises(ValueError, match=r"^ignore_eos is 'x'"):
        check_types(ours, params)


@pytest.mark.engine
def test_numbers_of_numpy_give_the_same_tokens(llm: Any) -> None:
    prompt = {"prompt_token_ids": np.array([5, 6, 7])}
    case = Case(prompt=(5, 6, 7), max_tokens=9, policy="threshold", threshold=0.5, temperature=0.5, top_p=0.75, seed=3)
    changes = {
        "seed": np.int64(3),
        "max_tokens": np.int32(9),
        "temperature": np.float32(0.5),
        "top_p": np.float32(0.75),
        "extra_args": {"dllm_policy": "threshold", "dllm_threshold": np.float32(0.5)},
    }
    (output,) = llm.generate([prompt], case.sampling_params(**changes), use_tqdm=False)
    assert [list(output.outputs[0].token_ids)] == run(llm, [case])


@pytest.mark.engine
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["5", 6], "prompt_token_ids[0] is '5', allowed are whole numbers; give the ids of tokens, or a text"),
        ([5, 6.0], "prompt_token_ids[1] is 6.0, allowed are whole numbers"),
        ([5, True], "prompt_token_ids[1] is True, allowed are whole numbers"),
        ([5, None], "prompt_token_ids[1] is None, allowed are whole numbers"),
        ([[5, 6], [7]], "prompt_token_ids[0] is [5, 6], allowed are whole numbers"),
        (np.array([5.0]), "prompt_token_ids[0] is 5.0, allowed are whole numbers"),
        ("5 6", "prompt_token_ids is '5 6', allowed are lists of whole numbers"),
        (7, "prompt_token_ids is 7, allowed are lists of whole numbers"),
    ],
)
def test_token_ids_of_a_wrong_type_are_refused_by_position(llm: Any, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        llm.generate([{"prompt_token_ids": ids}], Case(prompt=(5,), max_tokens=4).sampling_params(), use_tqdm=False)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("changes", "kept"), [({"truncate_prompt_tokens": -1}, 120), ({"truncate_prompt_tokens": 5}, 5)]
)
def test_a_prompt_is_cut_to_what_can_be_served(llm: Any, changes: dict[str, Any], kept: int) -> None:
    params = Case(prompt=(5,), max_tokens=40).sampling_params()
    prompt = {"prompt_token_ids": [5] * 130}
    (output,) = llm.generate([prompt], params, use_tqdm=False, tokenization_kwargs=changes)
    assert len(output.prompt_token_ids) == kept
    assert len(output.outputs[0].token_ids) == min(40, (128 - kept) // 8 * 8)


@pytest.mark.engine
@pytest.mark.parametrize("changes", [{"top_k": 2**63}, {"seed": 2**63 - 1, "n": 2}, {"max_tokens": 2**63}])
def test_huge_numbers_do_not_stop_the_engine(llm: Any, changes: dict[str, Any]) -> None:
    params = Case(prompt=(5, 6, 7), max_tokens=8, temperature=1.0).sampling_params(**changes)
    output = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)[0]
    assert all(len(completion.token_ids) >= 8 for completion in output.outputs)


@pytest.mark.engine
def test_dummy_runs_of_a_gpu_start(llm: Any) -> None:
    """What vLLM runs before a GPU engine serves: profiling and dummy batches, before and between real steps."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    case = Case(prompt=(5, 6, 7), max_tokens=8)
    tokens = run(llm, [case])
    for _ in range(2):
        runner.profile_run()
        for num_tokens, is_uniform in [(16, True), (16, False), (runner.max_num_tokens, False), (13, False)]:
            hidden, _sampled = runner._dummy_run(num_tokens, uniform_decode=is_uniform, skip_eplb=True)
            assert hidden.shape[0] == num_tokens
        assert run(llm, [case]) == tokens


@pytest.mark.engine
def test_a_prompt_without_room_for_a_block_is_a_value_error(llm: Any) -> None:
    for prompt_len in (121, 128, 129, 500):
        sentence = (
            f"the prompt has {prompt_len} tokens, but a block needs 8 of max_model_len 128; shorten the prompt to at"
        )
        with pytest.raises(ValueError, match=sentence):
            run(llm, [Case(prompt=(5,) * prompt_len, max_tokens=4)])
    with pytest.raises(ValueError, match="the prompt has at least 121 tokens"):
        llm.generate(["a b " * 100], Case(prompt=(5,), max_tokens=4).sampling_params(), use_tqdm=False)
    params = Case(prompt=(5,), max_tokens=4).sampling_params()
    with pytest.raises(ValueError, match="truncate_prompt_tokens is 121, allowed are null, -1"):
        llm.generate(["a"], params, use_tqdm=False, tokenization_kwargs={"truncate_prompt_tokens": 121})


def test_every_sampling_parameter_is_supported_or_refused() -> None:
    """A parameter that a new vLLM adds must be looked at before it is let through."""
    from vllm.sampling_params import SamplingParams

    from vllm_dllm.engine.refusals import REFUSED as REFUSED_PARAMETERS

    supported = {
        *("min_p", "logit_bias", "allowed_token_ids", "bad_words", "min_tokens"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("n", "logprobs", "temperature", "top_p", "top_k", "seed", "max_tokens", "extra_args"),
        *("structured_outputs", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
        *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind", "stream_interval"),
        *("output_text_buffer_length", "skip_clone", "skip_reading_prefix_cache", "flat_logprobs"),
        # Refused at start by the configuration they need, or without effect where it is off.
        *("watermarking", "routed_experts_prompt_start"),
    }
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields - supported - set(REFUSED_PARAMETERS) == set()
