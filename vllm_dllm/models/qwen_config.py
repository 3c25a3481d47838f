"""Configuration of checkpoints with Qwen's layers, under the field names of Qwen2 and Qwen3."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_config import WHERE, CheckpointConfig
from vllm_dllm.models.checkpoint_fields import CheckpointFields, Flag, MaybeSize, Off, Positive, Size, Unset


class QwenFields(CheckpointFields):
    """The fields of `Qwen2Config` and `Qwen3Config` that change the arithmetic."""

    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: MaybeSize = None
    head_dim: MaybeSize = None
    intermediate_size: Size
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: Flag = False

    attention_bias: Off = None
    dual_chunk_attention_config: Unset = None
    hidden_act: Annotated[Literal["silu"], Field(description="'silu', the one implemented")] = "silu"
    layer_types: Annotated[
        list[Literal["full_attention"]] | None, Field(description="null and lists of 'full_attention'")
    ] = None
    mlp_bias: Off = None
    partial_rotary_factor: Annotated[
        Annotated[float, Field(ge=1.0, le=1.0)] | None, Field(description="null and 1, since whole heads are rotated")
    ] = None
    sliding_window: Any = None  # given also where it is not in use; vLLM would use it
    use_mrope: Off = None
    use_sliding_window: Off = None


class QwenConfig(CheckpointConfig):
    """What Dream and SDAR have in common; a family says its biases, norms and mask token."""

    table: ClassVar[type[CheckpointFields]] = QwenFields
    bookkeeping: ClassVar[frozenset[str]] = frozenset({"max_window_layers"})
    published_eot_token_id: ClassVar[int | None] = 151645  # `<|im_end|>` of Qwen's tokenizers, which end a turn with it
    published_vocab_sizes: ClassVar[tuple[int, ...]] = (151936, 152064)

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: QwenFields) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        if fields.layer_types is not None and len(fields.layer_types) != fields.num_hidden_layers:
            raise ConfigError(
                f"layer_types in {WHERE} has {len(fields.layer_types)} entries, but num_hidden_layers is "
                f"{fields.num_hidden_layers}; allowed is one for each; remove it"
            )
        return {
            "hidden_size": fields.hidden_size,
            "num_hidden_layers": fields.num_hidden_layers,
            "num_attention_heads": fields.num_attention_heads,
            "num_key_value_heads": fields.num_key_value_heads or fields.num_attention_heads,
            "head_dim": fields.head_dim,
            "intermediate_size": fields.intermediate_size,
            "vocab_size": fields.vocab_size,
            "max_position_embeddings": fields.max_position_embeddings,
            "rms_norm_eps": fields.rms_norm_eps,
            "tie_word_embeddings": fields.tie_word_embeddings,
            "sliding_window": None,
        }
