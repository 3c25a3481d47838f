"""Configuration of LLaDA checkpoints under their published field names (arXiv:2502.09992)."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from vllm_dllm.models.checkpoint_fields import refuse_other_arithmetic

PUBLISHED_MASK_TOKEN_ID = 126336
PUBLISHED_EOT_TOKEN_ID = 126348

# Fields that would change the arithmetic, and the only values that the model class implements.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_type": ("llama",),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "clip_qkv": (None,),
    "multi_query_attention": (None, False),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False,),
}


class LLaDAConfig(PretrainedConfig):
    """LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5 and models of the same layers in other sizes.

    Raises: ConfigError for a field whose value asks for arithmetic that the model class does not implement.
    """

    model_type = "llada"
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int = 12288,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        weight_tying: bool = False,
        mask_token_id: int = PUBLISHED_MASK_TOKEN_ID,
        eot_token_id: int | None = None,
        **fields: Any,
    ) -> None:
        refuse_other_arithmetic(fields, _IMPLEMENTED, "LLaDA")
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads if n_kv_heads is not None else n_heads
        self.head_dim = d_model // n_heads
        self.mlp_hidden_size = mlp_hidden_size
        # The published files give both; the embedding has `embedding_size` rows.
        self.vocab_size = embedding_size if embedding_size is not None else vocab_size
        self.embedding_size = self.vocab_size
        self.max_sequence_length = max_sequence_length
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.mask_token_id = mask_token_id
        if eot_token_id is None and mask_token_id == PUBLISHED_MASK_TOKEN_ID:
            eot_token_id = PUBLISHED_EOT_TOKEN_ID
        self.eot_token_id = eot_token_id
        super().__init__(tie_word_embeddings=weight_tying, **fields)
