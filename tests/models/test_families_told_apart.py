"""Families that share a `model_type`, with each other or with a stock model, are told apart; a Llama stays one."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from tests.models.in_process import DIFFCODER, LLADA, read_config
from vllm_dllm.cli.inputs import family_for
from vllm_dllm.draft.graph_file import default_graph
from vllm_dllm.errors import ConfigError
from vllm_dllm.models.interface import FAMILY_BY_ARCHITECTURE, family_said
from vllm_dllm.models.llada_config import LLaDAConfig
from vllm_dllm.models.stable_diffcoder_config import StableDiffCoderConfig
from vllm_dllm.plugin import register

PLAIN = {name: value for name, value in DIFFCODER.items() if name not in ("auto_map", "mask_token_id", "block_size")}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def auto_map(name: str) -> dict[str, str]:
    return {"AutoConfig": "transformers.LlamaConfig", "AutoModelForCausalLM": name}


@pytest.mark.parametrize(
    ("fields", "architecture", "config_class"),
    [
        (DIFFCODER, "SeedDiffcoderForCausalLM", StableDiffCoderConfig),
        (
            PLAIN | {"auto_map": auto_map("repo--m.SeedDiffcoderForCausalLM"), "mask_token_id": 3},
            "SeedDiffcoderForCausalLM",
            StableDiffCoderConfig,
        ),
        (
            DIFFCODER | {"architectures": ["SeedDiffcoderForCausalLM"], "auto_map": None},
            "SeedDiffcoderForCausalLM",
            StableDiffCoderConfig,
        ),
        (PLAIN, "LlamaForCausalLM", LlamaConfig),
        (PLAIN | {"auto_map": auto_map("modeling_other.OtherForCausalLM")}, "LlamaForCausalLM", LlamaConfig),
        (PLAIN | {"auto_map": {}}, "LlamaForCausalLM", LlamaConfig),
        (LLADA, "LLaDAModelLM", LLaDAConfig),
    ],
)
def test_a_config_is_read_by_its_own_class(
    fields: dict[str, Any], architecture: str, config_class: type, tmp_path: Path
) -> None:
    config = read_config(tmp_path, fields)
    assert type(config.hf_config) is config_class
    assert config.architectures == [architecture]
    family = family_said(fields)
    assert (family and family.architecture) == (None if config_class is LlamaConfig else architecture)


def test_a_stock_llama_is_what_it_was(tmp_path: Path) -> None:
    """Whatever was read before: nothing of transformers' registry was changed for Llama's `model_type`."""
    read_config(tmp_path, DIFFCODER)
    assert type(AutoConfig.for_model("llama")) is LlamaConfig
    plain = read_config(tmp_path, PLAIN)
    assert (type(plain.hf_config), type(plain).__name__) == (LlamaConfig, "ModelConfig")
    assert not hasattr(plain.hf_config, "canvas_length")


def test_overrides_say_which_of_the_two_is_meant(tmp_path: Path) -> None:
    as_llama = read_config(tmp_path, DIFFCODER, {"architectures": ["LlamaForCausalLM"]})
    assert (type(as_llama.hf_config), as_llama.architectures) == (LlamaConfig, ["LlamaForCausalLM"])
    ours = read_config(tmp_path, PLAIN | {"mask_token_id": 3}, {"architectures": ["SeedDiffcoderForCausalLM"]})
    assert type(ours.hf_config) is StableDiffCoderConfig


def test_commands_tell_them_apart_too(tmp_path: Path) -> None:
    assert family_for("m", DIFFCODER).architecture == "SeedDiffcoderForCausalLM"
    with pytest.raises(ConfigError, match=r"model 'm' has architectures \['LlamaForCausalLM'\], allowed are "):
        family_for("m", PLAIN)


def test_default_draft_graphs_are_those_of_the_loop() -> None:
    """No graph was made for these families, whose `model_type` a graph's may not be."""
    found = {
        name: default_graph(policy, block_length, FAMILY_BY_ARCHITECTURE[name].model_type).provenance
        for name, policy, block_length in (
            ("SeedDiffcoderForCausalLM", "static", 4),
            ("SDARMoeForCausalLM", "dynamic", 4),
            ("LLaDAMoEModelLM", "threshold", 32),
        )
    }
    assert {name: (made.family, made.settings.policy) for name, made in found.items() if made} == {
        "SeedDiffcoderForCausalLM": ("sdar", "static"),
        "SDARMoeForCausalLM": ("sdar", "dynamic"),
        "LLaDAMoEModelLM": ("llada", "threshold"),
    }


def test_what_is_wrong_with_it_is_told_in_our_words(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    for name, value in (("hidden_size", "8"), ("model_type", "foo"), ("mask_token_id", None), ("mlp_bias", True)):
        (tmp_path / "config.json").write_text(json.dumps(DIFFCODER | {name: value}))
        with pytest.raises(ConfigError, match=rf"^{name} in .*config\.json"):
            EngineArgs(model=str(tmp_path), skip_tokenizer_init=True).create_engine_config()
