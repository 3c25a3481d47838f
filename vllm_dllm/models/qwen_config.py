"""Configuration of checkpoints with Qwen's layers, under the field names of Qwen2 and Qwen3."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from vllm_dllm.models.checkpoint_fields import refuse_other_arithmetic

PUBLISHED_EOT_TOKEN_ID = 151645
"""`<|im_end|>` of Qwen's tokenizers, which end a turn with it."""

# Fields that would change the arithmetic, and the only values that the model class implements.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "dual_chunk_attention_config": (None,),
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_type": ("default", None),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
}


class QwenConfig(PretrainedConfig):
    """What Dream and SDAR have in common; a family says its biases, norms and mask token.

    Raises: ConfigError for a field whose value asks for arithmetic that the model class does not implement.
    """

    published_mask_token_id: ClassVar[int]
    qkv_bias: ClassVar[bool]
    qk_norm: ClassVar[bool]

    def __init__(
        self,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 22016,
        vocab_size: int = 151936,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_parameters: Mapping[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        mask_token_id: int | None = None,
        eot_token_id: int | None = None,
        **fields: Any,
    ) -> None:
        # The same under two names: `rope_parameters` is what newer versions of transformers write.
        rope = {**(rope_scaling or {}), **(rope_parameters or {})}
        rope["rope_type"] = rope.pop("type", rope.get("rope_type"))
        refuse_other_arithmetic(rope | fields, _IMPLEMENTED, self.model_type)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads if num_key_value_heads is not None else num_attention_heads
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope.get("rope_theta", rope_theta)
        self.mask_token_id = mask_token_id if mask_token_id is not None else self.published_mask_token_id
        if eot_token_id is None and self.mask_token_id == self.published_mask_token_id:
            eot_token_id = PUBLISHED_EOT_TOKEN_ID
        self.eot_token_id = eot_token_id
        # Checkpoints give windows that are not in use; vLLM would use them.
        super().__init__(tie_word_embeddings=tie_word_embeddings, **fields | {"sliding_window": None})
