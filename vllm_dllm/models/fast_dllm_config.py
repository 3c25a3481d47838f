"""Fast-dLLM v2 (arXiv:2509.26328): Qwen2's layers, seen block by block."""

from typing import Any, ClassVar

from vllm_dllm.models.checkpoint_fields import CheckpointFields, MaybeSize
from vllm_dllm.models.qwen_config import QwenConfig, QwenFields


class FastDllmFields(QwenFields):
    """Qwen's fields, and the block length of training."""

    bd_size: MaybeSize = None


class FastDllmConfig(QwenConfig):
    """Fast-dLLM v2 1.5B and 7B and models of the same layers in other sizes."""

    model_type = "Fast_dLLM_Qwen"
    table: ClassVar[type[CheckpointFields]] = FastDllmFields
    bookkeeping: ClassVar[frozenset[str]] = QwenConfig.bookkeeping | {
        *("complementary_mask", "conplemenrary_mask", "mask_token")  # of training; the second is really spelled so
    }
    published_mask_token_id: ClassVar[int] = 151665
    qkv_bias: ClassVar[bool] = True

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        return {**super().resolve(fields), "bd_size": fields.bd_size, "block_size": fields.bd_size}
