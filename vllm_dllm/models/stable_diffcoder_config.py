"""Stable-DiffCoder-8B (arXiv:2601.15892): Llama's layers, seen block by block.

Its config.json says `LlamaForCausalLM` and `llama`; `auto_map` alone tells it from a Llama (`interface.family_said`).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_dllm.models.checkpoint_fields import CheckpointFields
from vllm_dllm.models.qwen_config import QwenConfig
from vllm_dllm.models.sdar_config import SDARFields


class StableDiffCoderFields(SDARFields):
    """The fields of `LlamaConfig` that change the arithmetic, and the block length of training."""

    pretraining_tp: Annotated[
        Literal[1] | None, Field(description="null and 1, since products are not computed in slices")
    ] = None


class StableDiffCoderConfig(QwenConfig):
    """Stable-DiffCoder-8B-Base, Stable-DiffCoder-8B-Instruct and models of the same layers in other sizes."""

    model_type = "llama"
    table: ClassVar[type[CheckpointFields]] = StableDiffCoderFields
    published_mask_token_id: ClassVar[int] = 5
    published_eot_token_id: ClassVar[int | None] = None  # its chat ends a turn with EOS
    published_vocab_sizes: ClassVar[tuple[int, ...]] = (155136,)

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        return {**super().resolve(fields), "block_size": fields.block_size}
