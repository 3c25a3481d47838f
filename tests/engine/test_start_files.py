"""Files of a checkpoint, and settings, that hold something else than they must: one sentence that names them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.in_process import TINY
from vllm_dllm import plugin
from vllm_dllm.errors import ConfigError


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


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("torch_dtype", "zz"), ("torch_dtype", "int8"), ("dtype", 5), ("dtype", [])),
        *(("quantization_config", "x"), ("quantization_config", [1]), ("model_type", "llama")),
    ],
)
def test_fields_that_transformers_and_vllm_read(family: str, name: str, value: object, tmp_path: Path) -> None:
    said = refusal(tmp_path, TINY[family] | {name: value})
    assert said.startswith(f"{name} in the checkpoint's config.json is {value!r}, ")


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
    assert model.get_diff_sampling_param() == {"temperature": 0.0, "top_k": 9}
    text = '{"max_new_tokens": 0, "eos_token_id": [1, 5]}'
    model = engine_config(tmp_path, generation=text, generation_config="vllm").model_config
    assert model.try_get_generation_config() == {"eos_token_id": [1, 5]}
    assert model.get_diff_sampling_param() == {}
