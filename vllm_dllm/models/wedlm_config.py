"""WeDLM (arXiv:2512.22737): Qwen3's layers, or Qwen2's, seen in another order than that of positions."""

from typing import Any, ClassVar

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_config import WHERE
from vllm_dllm.models.checkpoint_fields import CheckpointFields, Flag, MaybeFlag
from vllm_dllm.models.qwen_config import QwenConfig, QwenFields


class WeDLMFields(QwenFields):
    """Qwen's fields; `attention_bias` says whose layers they are."""

    attention_bias: Flag = True  # type: ignore[assignment]  # the other families have one answer
    qk_norm: MaybeFlag = None


class WeDLMConfig(QwenConfig):
    """WeDLM 7B and 8B, their Base, and models of the same layers in other sizes.

    The 8B has Qwen3's layers: norms of query and key, and no biases. The 7B has Qwen2's: biases and no norms. Their
    config.json names no mask token.
    """

    model_type = "wedlm"
    table: ClassVar[type[CheckpointFields]] = WeDLMFields
    published_mask_token_id: ClassVar[int] = 151665

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    @property
    def qkv_bias(self) -> bool:  # type: ignore[override]  # of the other families it is one for all
        """Whether query, key and value have biases."""
        return bool(self.attention_bias)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        if fields.qk_norm not in (None, not fields.attention_bias):
            raise ConfigError(
                f"qk_norm in {WHERE} is {fields.qk_norm}, but attention_bias is {fields.attention_bias}, and layers of "
                "this family have either biases or norms; allowed is null, and the opposite of attention_bias; correct "
                "one of them"
            )
        layers = {"attention_bias": fields.attention_bias, "qk_norm": not fields.attention_bias}
        return super().resolve(fields) | layers
