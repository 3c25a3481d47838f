"""WeDLM: published configurations of its two kinds of layers, and the names of their tensors."""

from pathlib import Path
from typing import Any

import pytest

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_tensors import needed_tensors
from vllm_dllm.models.wedlm_config import WeDLMConfig

# config.json of the published checkpoints, fields that matter.
WEDLM_8B: dict[str, Any] = {
    "architectures": ["WeDLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 36,
    "mask_token_id": None,
    "max_position_embeddings": 16384,
    "max_window_layers": 36,
    "model_type": "wedlm",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "pad_token_id": 151643,
    "qk_norm": True,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
WEDLM_7B = WEDLM_8B | {
    "attention_bias": True,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "layer_types": ["full_attention"] * 28,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "qk_norm": False,
    "vocab_size": 152064,
}


def test_published_fields() -> None:
    for fields, kind in ((WEDLM_8B, (False, True)), (WEDLM_7B, (True, False))):
        config = WeDLMConfig(**fields)
        assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == (151665, 151643, 151645)
        assert (config.qkv_bias, config.qk_norm) == kind
        assert (config.head_dim, config.num_positions) == (128, 16384)
        assert not hasattr(config, "canvas_length")


@pytest.mark.parametrize("has_biases", [False, True])
def test_layers_are_told_by_their_biases(has_biases: bool) -> None:
    """A file may leave `qk_norm` out, as the engine's code does not read it; without `attention_bias` it is on."""
    fields = WEDLM_8B | {"qk_norm": None, "attention_bias": has_biases}
    assert WeDLMConfig(**fields).qk_norm is not has_biases
    config = WeDLMConfig(**{name: value for name, value in fields.items() if name != "attention_bias"})
    assert (config.qkv_bias, config.qk_norm) == (True, False)
    config.update({"attention_bias": has_biases})
    assert (config.qkv_bias, config.qk_norm) == (has_biases, not has_biases)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": False}, "qk_norm in the checkpoint's config.json is False, but attention_bias is False"),
        ({"attention_bias": True}, "qk_norm in the checkpoint's config.json is True, but attention_bias is True"),
        ({"attention_bias": None}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"vocab_size": 1000, "eos_token_id": 5, "pad_token_id": 5, "bos_token_id": 5}, "mask_token_id"),
        ({"mask_token_id": 151643}, "mask_token_id"),
        ({"block_size": 16}, "block_size"),
    ],
)
def test_other_arithmetic_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeDLMConfig(**WEDLM_8B | changes)


@pytest.mark.parametrize("fields", [WEDLM_8B, WEDLM_7B], ids=["8b", "7b"])
def test_a_saved_configuration_is_read_again(fields: dict[str, Any], tmp_path: Path) -> None:
    config = WeDLMConfig(**fields)
    config.save_pretrained(tmp_path)
    again = WeDLMConfig.from_pretrained(tmp_path)
    for name in ("rope_theta", "mask_token_id", "eot_token_id", "qkv_bias", "qk_norm", "num_key_value_heads"):
        assert getattr(again, name) == getattr(config, name)


def test_every_published_tensor_has_a_place() -> None:
    names = needed_tensors(WeDLMConfig(**WEDLM_8B))
    assert len(names) == 36 * 11 + 3
    assert names["lm_head.weight"] == names["model.embed_tokens.weight"] == (151936, 4096)
    assert names["model.layers.35.self_attn.k_norm.weight"] == (128,)
    assert "model.layers.0.self_attn.q_proj.bias" not in names
    biased = needed_tensors(WeDLMConfig(**WEDLM_7B))
    assert len(biased) == 28 * 12 + 3
    assert biased["model.layers.27.self_attn.v_proj.bias"] == (512,)
    assert not any("_norm." in name for name in biased if "self_attn" in name)
