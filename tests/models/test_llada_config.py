"""The published LLaDA configuration, read as vLLM reads it, and the names of its tensors."""

import pytest

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.llada_config import LLaDAConfig

# config.json of LLaDA-8B-Instruct (LLaDA-8B-Base and LLaDA-1.5 are alike), fields that matter.
PUBLISHED = {
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "clip_qkv": None,
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


def test_published_fields_answer_to_vllms_names() -> None:
    config = LLaDAConfig(**PUBLISHED)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (4096, 32, 12288)
    assert (config.num_attention_heads, config.num_key_value_heads) == (32, 32)
    assert (config.vocab_size, config.max_position_embeddings, config.rope_theta) == (126464, 4096, 500000.0)
    assert config.tie_word_embeddings is False
    assert (config.mask_token_id, config.eos_token_id, config.eot_token_id) == (126336, 126081, 126348)


def test_another_vocabulary_has_its_own_end_of_turn() -> None:
    assert LLaDAConfig(**PUBLISHED | {"mask_token_id": 3}).eot_token_id is None
    assert LLaDAConfig(**PUBLISHED | {"mask_token_id": 3, "eot_token_id": 6}).eot_token_id == 6


def test_grouped_heads_default_to_all() -> None:
    assert LLaDAConfig(**PUBLISHED | {"n_kv_heads": None}).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [("alibi", True), ("include_qkv_bias", True), ("block_type", "sequential"), ("rope_full_precision", False)],
)
def test_other_arithmetic_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} in the checkpoint's config.json is {value!r}"):
        LLaDAConfig(**PUBLISHED | {field: value})


def test_every_published_tensor_has_a_place() -> None:
    from vllm_dllm.models.llada import LLaDAModelLM

    layer = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm"]
    names = [f"model.transformer.blocks.{i}.{name}.weight" for i in range(32) for name in layer]
    names += [f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")]
    mapped = {LLaDAModelLM.hf_to_vllm_mapper.map_name(name) for name in names}
    expected = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    expected |= {"input_layernorm", "post_attention_layernorm"}
    assert len(names) == 291
    assert mapped == {f"model.layers.{i}.{name}.weight" for i in range(32) for name in expected} | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_quantisation_finds_the_layers_it_names() -> None:
    """vLLM maps the names in a quantisation config by the renames alone, and compares them with modules' prefixes."""
    from vllm_dllm.models.llada import LLaDAModelLM

    given = ["blocks.7.q_proj", "blocks.7.ff_proj", "blocks.7.up_proj", "blocks.7.ff_out", "ff_out"]
    mapper = LLaDAModelLM.hf_to_vllm_mapper.get_rename_mapper()
    assert mapper.apply_list([f"model.transformer.{name}" for name in given]) == [
        "model.layers.7.self_attn.q_proj",
        "model.layers.7.mlp.gate_proj",
        "model.layers.7.mlp.up_proj",
        "model.layers.7.mlp.down_proj",
        "lm_head",
    ]
