"""SDAR (arXiv:2510.06303) and TraDo (arXiv:2509.06949): Qwen3's layers, seen block by block."""

from typing import Any, ClassVar

from vllm_dllm.models.checkpoint_fields import CheckpointFields, MaybeSize
from vllm_dllm.models.qwen_config import QwenConfig, QwenFields


class SDARFields(QwenFields):
    """Qwen's fields, and the block length of training."""

    block_size: MaybeSize = None


class SDARConfig(QwenConfig):
    """SDAR-Chat in all sizes and block lengths, TraDo and models of the same layers in other sizes.

    Their config.json names neither mask token nor, in some, the block length.
    """

    model_type = "sdar"
    table: ClassVar[type[CheckpointFields]] = SDARFields
    bookkeeping: ClassVar[frozenset[str]] = QwenConfig.bookkeeping | {
        *("ep_size", "micro_forward", "skip_checkpoint", "use_deepep")  # of training, which SDAR's files keep
    }
    published_mask_token_id: ClassVar[int] = 151669
    qk_norm: ClassVar[bool] = True

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        return {**super().resolve(fields), "block_size": fields.block_size}
