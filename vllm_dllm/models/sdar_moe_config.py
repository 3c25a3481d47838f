"""SDAR-30B-A3B (arXiv:2510.06303): Qwen3-MoE's layers, seen block by block."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_dllm.models.checkpoint_fields import CheckpointFields, Flag, Size
from vllm_dllm.models.experts_config import EXPERTS_BOOKKEEPING, NoExperts, experts
from vllm_dllm.models.sdar_config import SDARConfig, SDARFields


class SDARMoeFields(SDARFields):
    """The fields of `Qwen3MoeConfig` that change the arithmetic, and the block length of training."""

    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    norm_topk_prob: Flag = True
    intermediate_size: Any = None  # of dense layers, of which there are none
    decoder_sparse_step: Annotated[
        Literal[1] | None, Field(description="null and 1, since all layers have experts")
    ] = None
    mlp_only_layers: Annotated[
        Annotated[list[int], Field(max_length=0)] | None,
        Field(description="null and the empty list, since all layers have experts"),
    ] = None
    shared_expert_intermediate_size: NoExperts = None


class SDARMoeConfig(SDARConfig):
    """SDAR-30B-A3B-Chat, SDAR-30B-A3B-Sci and models of the same layers in other sizes."""

    model_type = "sdar_moe"
    table: ClassVar[type[CheckpointFields]] = SDARMoeFields
    bookkeeping: ClassVar[frozenset[str]] = SDARConfig.bookkeeping | EXPERTS_BOOKKEEPING
    has_experts: ClassVar[bool] = True

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        return super().resolve(fields) | experts(
            num=fields.num_experts,
            per_token=fields.num_experts_per_tok,
            inner=fields.moe_intermediate_size,
            renormalises=fields.norm_topk_prob,
        )
