"""The published Dream and SDAR configurations, read as vLLM reads them, and the names of their tensors."""

import re
from pathlib import Path
from typing import Any

import pytest

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_tensors import needed_tensors
from vllm_dllm.models.dream_config import DreamConfig
from vllm_dllm.models.interface import FAMILIES
from vllm_dllm.models.llada_moe_config import LLaDAMoeConfig
from vllm_dllm.models.qwen_config import QwenConfig
from vllm_dllm.models.sdar_config import SDARConfig
from vllm_dllm.models.sdar_moe_config import SDARMoeConfig
from vllm_dllm.models.stable_diffcoder_config import StableDiffCoderConfig

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
SDAR_30B = SDAR_4B | {
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "eos_token_id": 156892,
    "expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": None,
    "max_position_embeddings": 8192,
    "model_type": "llada",
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 156892,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1.0,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "vocab_size": 157184,
}
STABLE_DIFFCODER = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"},
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 155136,
}
PUBLISHED = {
    "sdar-moe": (SDARMoeConfig, SDAR_30B),
    "llada-moe": (LLaDAMoeConfig, LLADA_MOE),
    "stable-diffcoder": (StableDiffCoderConfig, STABLE_DIFFCODER),
    "dream": (DreamConfig, DREAM),
    "sdar-4b": (SDARConfig, SDAR_4B),
    "sdar-8b-b32": (SDARConfig, SDAR_8B),
}


@pytest.fixture(params=list(PUBLISHED))
def published(request: pytest.FixtureRequest) -> tuple[type[QwenConfig], dict[str, Any]]:
    """A configuration class and the published fields."""
    return PUBLISHED[request.param]


def test_published_fields_are_kept(published: tuple[type[QwenConfig], dict[str, Any]]) -> None:
    config_class, fields = published
    config = config_class(**fields)
    changed = {name for name, value in fields.items() if name in config.__dict__ and getattr(config, name) != value}
    assert changed <= {"sliding_window", "norm_topk_prob", "shared_expert_intermediate_size"}
    assert config.sliding_window is None
    assert config.head_dim == 128


def test_dream_has_its_tokens() -> None:
    config = DreamConfig(**DREAM)
    assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == (151666, 151643, 151645)


def test_sdar_names_neither_mask_token_nor_block_length() -> None:
    config = SDARConfig(**SDAR_4B)
    assert (config.mask_token_id, config.eot_token_id, config.block_size) == (151669, 151645, None)
    assert SDARConfig(**SDAR_8B).block_size == 32


@pytest.mark.parametrize(
    ("name", "special", "experts"),
    [
        ("stable-diffcoder", (5, 2, None), None),
        ("sdar-moe", (151669, 151643, 151645), (128, 8, 768, True)),
        ("llada-moe", (156895, 156892, None), (64, 8, 1024, False)),
    ],
)
def test_tokens_and_experts(name: str, special: tuple[int | None, ...], experts: tuple[Any, ...] | None) -> None:
    config_class, fields = PUBLISHED[name]
    config = config_class(**fields)
    assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == special
    assert config.has_experts == (experts is not None)
    if experts:
        asked = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        assert tuple(getattr(config, each) for each in asked) == experts
        assert config_class(**fields | {"norm_topk_prob": False}).norm_topk_prob is False
        assert config_class(**fields | {"norm_topk_prob": True}).norm_topk_prob is experts[3]


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


@pytest.mark.parametrize(
    ("name", "count"),
    [("dream", 339), ("sdar-4b", 399), ("stable-diffcoder", 291), ("llada-moe", 3219), ("sdar-moe", 18867)],
)
def test_every_published_tensor_has_a_place(name: str, count: int) -> None:
    """A layer of Qwen3-MoE has 128 experts of 3 tensors, what chooses among them, 4 projections and 4 norms."""
    from vllm_dllm.models.transformer import MaskedDiffusionLM

    config_class, fields = PUBLISHED[name]
    config = config_class(**fields)
    needed = needed_tensors(config)
    assert len(needed) == count
    mapped = {MaskedDiffusionLM.hf_to_vllm_mapper.map_name(tensor) for tensor in needed}
    layer = {tensor.removeprefix("model.layers.0.") for tensor in mapped if ".layers.0." in tensor}
    dense = {"mlp.gate_up_proj.weight", "mlp.down_proj.weight"}
    parts = [f"{i}.{part}_proj" for i in range(getattr(config, "num_experts", 0)) for part in ("gate", "up", "down")]
    experts = {"mlp.gate.weight", *(f"mlp.experts.{part}.weight" for part in parts)}
    norms = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert layer == {
        *("self_attn.qkv_proj.weight", "self_attn.o_proj.weight"),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *(["self_attn.qkv_proj.bias"] if config.qkv_bias else []),
        *(norms if config.qk_norm else []),
        *(experts if config.has_experts else dense),
    }
    assert needed["lm_head.weight"] == (config.vocab_size, config.hidden_size)
