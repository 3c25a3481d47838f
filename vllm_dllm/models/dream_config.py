"""Dream-7B (arXiv:2508.15487) and DiffuCoder-7B (arXiv:2506.20639): Qwen2's layers, seen in both directions."""

from typing import Any, ClassVar

from vllm_dllm.models.qwen_config import QwenConfig


class DreamConfig(QwenConfig):
    """Dream-v0-Base, Dream-v0-Instruct, Dream-Coder, DiffuCoder and models of the same layers in other sizes."""

    model_type = "Dream"
    published_mask_token_id: ClassVar[int] = 151666
    qkv_bias: ClassVar[bool] = True

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)
