"""The published Dream and SDAR configurations, read as vLLM reads them, and the names of their tensors."""

import re
from pathlib import Path
from typing import Any

import pytest

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.dream_config import DreamConfig
from vllm_dllm.models.interface import FAMILIES
from vllm_dllm.models.qwen_config import QwenConfig
from vllm_dllm.models.sdar_config import SDARConfig

# config.json of the published checkpoints, fields that matter.
DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SDAR_4B = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SDAR_8B = SDAR_4B | {"hidden_size": 4096, "intermediate_size": 12288, "block_size": 32, "mask_token_id": 151669}
PUBLISHED = {"dream": (DreamConfig, DREAM), "sdar-4b": (SDARConfig, SDAR_4B), "sdar-8b-b32": (SDARConfig, SDAR_8B)}


@pytest.fixture(params=list(PUBLISHED))
def published(request: pytest.FixtureRequest) -> tuple[type[QwenConfig], dict[str, Any]]:
    """A configuration class and the published fields."""
    return PUBLISHED[request.param]


def test_published_fields_are_kept(published: tuple[type[QwenConfig], dict[str, Any]]) -> None:
    config_class, fields = published
    config = config_class(**fields)
    changed = {name for name, value in fields.items() if name in config.__dict__ and getattr(config, name) != value}
    assert changed <= {"sliding_window"}
    assert config.sliding_window is None
    assert config.head_dim == 128


def test_dream_has_its_tokens() -> None:
    config = DreamConfig(**DREAM)
    assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == (151666, 151643, 151645)


def test_sdar_names_neither_mask_token_nor_block_length() -> None:
    config = SDARConfig(**SDAR_4B)
    assert (config.mask_token_id, config.eot_token_id, config.block_size) == (151669, 151645, None)
    assert SDARConfig(**SDAR_8B).block_size == 32


def test_another_vocabulary_has_its_own_end_of_turn() -> None:
    assert DreamConfig(**DREAM | {"mask_token_id": 3}).eot_token_id is None
    assert SDARConfig(**SDAR_4B | {"mask_token_id": 3, "eot_token_id": 6}).eot_token_id == 6


def test_defaults_of_heads() -> None:
    config = DreamConfig(**DREAM | {"num_key_value_heads": None, "head_dim": None})
    assert (config.num_key_value_heads, config.head_dim) == (28, 128)


def test_rope_has_the_same_base_under_its_newer_name() -> None:
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    old = {name: value for name, value in DREAM.items() if not name.startswith("rope")}
    assert DreamConfig(**DREAM).rope_theta == 1e6
    assert DreamConfig(**old, rope_theta=7.0, rope_scaling={"type": "default"}).rope_theta == 7.0
    assert DreamConfig(**old, rope_parameters=parameters).rope_theta == 5e5


def test_a_saved_configuration_is_read_again(
    published: tuple[type[QwenConfig], dict[str, Any]], tmp_path: Path
) -> None:
    config_class, fields = published
    config = config_class(**fields)
    config.save_pretrained(tmp_path)
    again = config_class.from_pretrained(tmp_path)
    for name in ("rope_theta", "mask_token_id", "head_dim", "num_key_value_heads", "vocab_size", "eot_token_id"):
        assert getattr(again, name) == getattr(config, name)


@pytest.mark.parametrize(
    ("name", "fields", "value"),
    [
        ("use_sliding_window", {"use_sliding_window": True}, True),
        ("attention_bias", {"attention_bias": True}, True),
        ("hidden_act", {"hidden_act": "gelu"}, "gelu"),
        ("use_mrope", {"use_mrope": True}, True),
        ("rope_type", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3"),
        ("rope_type", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
        ("layer_types", {"layer_types": ["sliding_attention"]}, ["sliding_attention"]),
    ],
)
def test_other_arithmetic_is_refused_by_name(
    published: tuple[type[QwenConfig], dict[str, Any]], name: str, fields: dict[str, Any], value: object
) -> None:
    config_class, given = published
    with pytest.raises(ConfigError, match=re.escape(f"{name} in the checkpoint's config.json is {value!r}")):
        config_class(**given | fields)


def test_families_name_their_configurations() -> None:
    from pkgutil import resolve_name

    for family in FAMILIES:
        assert resolve_name(family.config_class).model_type == family.model_type


LAYER = [f"self_attn.{name}_proj.weight" for name in "qkvo"] + [f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
LAYER += ["input_layernorm.weight", "post_attention_layernorm.weight"]
BIASES = [f"self_attn.{name}_proj.bias" for name in "qkv"]
NORMS = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
EXPECTED = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"}
EXPECTED |= {"input_layernorm.weight", "post_attention_layernorm.weight"}


@pytest.mark.parametrize(
    ("num_layers", "more", "expected_more", "count"),
    [(28, BIASES, {"self_attn.qkv_proj.bias"}, 339), (36, NORMS, set(NORMS), 399)],
    ids=["dream", "sdar"],
)
def test_every_published_tensor_has_a_place(
    num_layers: int, more: list[str], expected_more: set[str], count: int
) -> None:
    from vllm_dllm.models.transformer import MaskedDiffusionLM

    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names = [f"model.layers.{i}.{name}" for i in range(num_layers) for name in LAYER + more] + list(outside)
    mapped = {MaskedDiffusionLM.hf_to_vllm_mapper.map_name(name) for name in names}
    assert len(names) == count
    assert mapped == {f"model.layers.{i}.{n}" for i in range(num_layers) for n in EXPECTED | expected_more} | outside
