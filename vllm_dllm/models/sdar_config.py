"""SDAR (arXiv:2510.06303) and TraDo (arXiv:2509.06949): Qwen3's layers, seen block by block."""

from typing import Any, ClassVar

from vllm_dllm.models.qwen_config import QwenConfig


class SDARConfig(QwenConfig):
    """SDAR-Chat in all sizes and block lengths, TraDo and models of the same layers in other sizes.

    Their config.json names neither mask token nor, in some, the block length.
    """

    model_type = "sdar"
    published_mask_token_id: ClassVar[int] = 151669
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = True

    def __init__(self, block_size: int | None = None, **fields: Any) -> None:
        self.block_size = block_size
        super().__init__(**fields)
