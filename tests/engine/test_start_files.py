"""Files of a checkpoint, and settings, that hold something else than they must: one sentence that names them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.in_process import TINY
from vllm_dllm import plugin
from vllm_dllm.errors import ConfigError


@pytest.fixture(autouse=True)
def _as_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process vLLM warns of the seed, and formats it as a number."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


OWN_TYPES = [family for family in TINY if family != "diffcoder"]
"""Families that `architectures` and `model_type` tell; of the other see tests/models/test_families_told_apart.py."""


def engine_config(folder: Path, config: object = TINY["llada"], generation: str | None = None, **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    changes = {"additional_config": {"dllm": {"block_length": 8}}} | changes
    return EngineArgs(model=str(folder), skip_tokenizer_init=True, dtype="float32", **changes).create_engine_config()


def refusal(*args: Any, **changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        engine_config(*args, **changes)
    assert "object has no attribute" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("content", [[], [1], "x", 5, None])
def test_a_config_that_is_no_object(content: object, tmp_path: Path) -> None:
    said = refusal(tmp_path, content)
    assert said.startswith(f"config.json of {tmp_path} is {content!r}; allowed is an object; ")


@pytest.mark.parametrize("family", OWN_TYPES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("torch_dtype", "zz"), ("torch_dtype", "int8"), ("dtype", 5), ("dtype", [])),
        *(("quantization_config", "x"), ("quantization_config", [1]), ("model_type", "llama")),
    ],
)
def test_fields_that_transformers_and_vllm_read(family: str, name: str, value: object, tmp_path: Path) -> None:
    said = refusal(tmp_path, TINY[family] | {name: value})
    wheres = ("the checkpoint's config.json", f"config.json of {tmp_path}")  # where vLLM has no class for such fields
    assert said.startswith(tuple(f"{name} in {where} is {value!r}, " for where in wheres))


@pytest.mark.parametrize("family", OWN_TYPES)
@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(("architectures", value, "['") for value in ([], None, [5], ["Foo"], "Foo", {})),
        *(("model_type", value, "'") for value in ([], 5, "foo", "", None)),
        ("auto_map", 5, "an object"),
    ],
)
def test_fields_that_say_whose_model_it_is(family: str, name: str, value: object, allowed: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, TINY[family] | {name: value})
    assert said.startswith(f"{name} in config.json of {tmp_path} is {value!r}, but allowed is {allowed}")
    assert name == "auto_map" or repr(TINY[family][name]) in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"generation_config": "/nope"}, "generation_config is '/nope', but generation_config.json is not there; all"),
        ({"generation_config": "."}, "generation_config is '.', but generation_config.json is not there; allowed are"),
        ({"hf_config_path": "/nope"}, "hf_config_path is '/nope', but config.json is not there; allowed is a folder"),
        *(
            ({"max_num_seqs": v}, f"max_num_seqs is {v!r}, allowed are whole numbers from 1 on")
            for v in (0, -1, "x", 1.5)
        ),
        *(({"max_num_batched_tokens": v}, f"max_num_batched_tokens is {v!r}, allowed are whole") for v in (0, "x")),
        ({"max_model_len": "x"}, "max_model_len is 'x', allowed are whole numbers"),
        ({"max_model_len": 0}, "max_model_len must be a positive integer, got int: 0"),
        ({"max_model_len": 2**40}, "max_model_len is 1099511627776, but config.json has rotary positions up to"),
        *(({"block_size": v}, f"block_size is {v}, allowed are numbers above 0") for v in (0, -1)),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0, allowed are numbers from 1 on"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization is 2, allowed are numbers up to 1"),
        ({"seed": "x"}, "seed is 'x', allowed are whole numbers"),
        ({"kv_cache_dtype": "x"}, "kv_cache_dtype is 'x', but attention of diffusion models reads auto, float16, bfl"),
        ({"scheduling_policy": "x"}, "scheduling_policy is 'x', allowed are 'fcfs' or 'priority'"),
        ({"hf_overrides": [1]}, "hf_overrides is [1], allowed are objects or functions"),
        ({"override_generation_config": [1]}, "override_generation_config is [1], allowed are objects"),
        ({"quantization": "x"}, "Unknown quantization method: x."),
        ({"hf_overrides": {"architectures": []}}, "architectures in config.json of "),
    ],
)
def test_settings_that_vllm_refuses_are_told_by_name(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, **changes)
    assert said.startswith(sentence)
    for raw in ("validation error", "Input should", "ArgsKwargs", "VLLM_ALLOW_LONG"):
        assert raw not in said


def test_what_vllm_says_of_other_models_stays(tmp_path: Path) -> None:
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValidationError, match="Input should be greater than 0"):
        EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, block_size=0).create_engine_config()


@pytest.mark.parametrize("value", ["x", 5, [], None])
def test_additional_config_that_is_no_object(value: object, tmp_path: Path) -> None:
    for more in ({}, {"speculative_config": {"method": "spiffy"}}):
        said = refusal(tmp_path, additional_config=value, **more)
        assert said == f"additional_config is {value!r}, allowed are objects; give one as {{'dllm': {{}}}}"


def test_settings_without_a_meaning(tmp_path: Path) -> None:
    assert refusal(tmp_path, additional_config={"dllm": {1: 2}}).startswith("additional_config.dllm.1 is not known; ")
    for value in (0, -5):
        said = refusal(tmp_path, max_num_batched_tokens=value)
        assert said.startswith(f"max_num_batched_tokens is {value}, allowed are whole numbers from 1 on")


@pytest.mark.parametrize(
    ("text", "before", "behind"),
    [
        ("[]", "", "is []; allowed is an object; "),
        ("null", "", "is None; allowed is an object; "),
        ('"x"', "", "is 'x'; allowed is an object; "),
        ('{"temperature": 0.5', "", "is no JSON ("),
        ('{"max_new_tokens": "x"}', "max_new_tokens in ", "is 'x', which transformers refuses; "),
        ('{"temperature": 0.5, "max_new_tokens": 0}', "max_new_tokens in ", "is 0, which transformers refuses ("),
    ],
)
def test_a_generation_config_that_cannot_be_read(text: str, before: str, behind: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, generation=text)
    assert said.startswith(f"{before}generation_config.json of {tmp_path} {behind}")
    assert said.endswith("--generation-config vllm")
    engine_config(tmp_path, generation=text, generation_config="vllm")


def test_what_is_left_of_a_generation_config(tmp_path: Path) -> None:
    model = engine_config(tmp_path, generation='{"temperature": 5, "top_k": 9}').model_config
    assert model.get_diff_sampling_param() == {"temperature": 0.0, "max_tokens": 128, "top_k": 9}
    text = '{"max_new_tokens": 0, "eos_token_id": [1, 5]}'
    model = engine_config(tmp_path, generation=text, generation_config="vllm").model_config
    assert model.try_get_generation_config() == {"eos_token_id": [1, 5]}
    assert model.get_diff_sampling_param() == {}
