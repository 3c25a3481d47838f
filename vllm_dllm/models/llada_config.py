"""Configuration of LLaDA checkpoints under their published field names (arXiv:2502.09992)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_config import WHERE, CheckpointConfig
from vllm_dllm.models.checkpoint_fields import CheckpointFields, Flag, MaybeSize, Off, On, Positive, Size, Unset


class LLaDAFields(CheckpointFields):
    """The fields of `LLaDAConfig` in the published code that change the arithmetic."""

    d_model: Size
    n_layers: Size
    n_heads: Size
    n_kv_heads: MaybeSize = None
    head_dim: MaybeSize = None  # not published; a saved configuration has it
    mlp_hidden_size: MaybeSize = None
    mlp_ratio: MaybeSize = None
    vocab_size: Size
    embedding_size: MaybeSize = None
    max_sequence_length: Size
    rms_norm_eps: Positive = 1e-5
    weight_tying: Flag = False

    activation_type: Annotated[Literal["silu"], Field(description="'silu', the one implemented")] = "silu"
    alibi: Off = None
    attention_layer_norm: Off = None
    bias_for_layer_norm: Off = None
    block_group_size: Annotated[Literal[1], Field(description="1, the one implemented")] = 1
    block_type: Annotated[Literal["llama"], Field(description="'llama', the one implemented")] = "llama"
    clip_qkv: Unset = None
    include_bias: Off = None
    include_qkv_bias: Off = None
    input_emb_norm: Off = None
    layer_norm_type: Annotated[Literal["rms"], Field(description="'rms', the one implemented")] = "rms"
    layer_norm_with_affine: On = True
    multi_query_attention: Off = None
    rope: On = True
    rope_full_precision: On = True
    scale_logits: Off = None


class LLaDAConfig(CheckpointConfig):
    """LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5 and models of the same layers in other sizes."""

    model_type = "llada"
    table: ClassVar[type[CheckpointFields]] = LLaDAFields
    bookkeeping: ClassVar[frozenset[str]] = frozenset(
        {"alibi_bias_max", "attention_layer_norm_with_affine", "train_max_sequence_length"}
    )
    published_mask_token_id: ClassVar[int] = 126336
    published_eot_token_id: ClassVar[int | None] = 126348
    published_vocab_sizes: ClassVar[tuple[int, ...]] = (126464,)
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    tensor_names: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens": "model.transformer.wte",
        "model.layers": "model.transformer.blocks",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
    }

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: LLaDAFields) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute.

        The embedding has `embedding_size` rows where it is given, and the feed-forward network `mlp_ratio` times
        `d_model` elements where `mlp_hidden_size` is not.
        """
        num_tokens = fields.embedding_size or fields.vocab_size
        if num_tokens < fields.vocab_size:
            raise ConfigError(
                f"embedding_size in {WHERE} is {num_tokens}, but vocab_size is {fields.vocab_size}; allowed are null "
                "and numbers from vocab_size on; correct one of them"
            )
        if fields.mlp_hidden_size is None and fields.mlp_ratio is None:
            raise ConfigError(
                f"mlp_hidden_size in {WHERE} is missing or null, and so is mlp_ratio; allowed are whole numbers from 1 "
                "on; give one of them"
            )
        n_kv_heads = fields.n_kv_heads or fields.n_heads
        if fields.multi_query_attention is False and n_kv_heads != fields.n_heads:
            raise ConfigError(
                f"multi_query_attention in {WHERE} is False, which asks for as many key heads as n_heads "
                f"{fields.n_heads}, but n_kv_heads is {n_kv_heads}; allowed is null; remove it"
            )
        if fields.head_dim not in (None, fields.d_model // fields.n_heads):
            raise ConfigError(
                f"head_dim in {WHERE} is {fields.head_dim}, but LLaDA's heads share d_model {fields.d_model} evenly; "
                f"allowed is {fields.d_model // fields.n_heads}; remove it"
            )
        return {
            "d_model": fields.d_model,
            "n_layers": fields.n_layers,
            "n_heads": fields.n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": None,
            "mlp_hidden_size": fields.mlp_hidden_size or fields.d_model * (fields.mlp_ratio or 1),
            "vocab_size": num_tokens,
            "embedding_size": num_tokens,
            "max_sequence_length": fields.max_sequence_length,
            "rms_norm_eps": fields.rms_norm_eps,
            "weight_tying": fields.weight_tying,
        }
