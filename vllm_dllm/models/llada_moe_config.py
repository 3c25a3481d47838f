"""LLaDA-MoE-7B-A1B: OLMoE's experts behind Qwen3's attention, seen in both directions.

Its `model_type` is LLaDA's; `architectures` tell the two apart.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_dllm.models.checkpoint_fields import CheckpointFields, MaybeFlag, Off, On, Positive, Size, Unset
from vllm_dllm.models.experts_config import EXPERTS_BOOKKEEPING, NoExperts, experts
from vllm_dllm.models.qwen_config import QwenConfig, QwenFields


class LLaDAMoeFields(QwenFields):
    """The fields of the published `LLaDAConfig` of models with experts that change the arithmetic."""

    num_experts: Size
    num_experts_per_tok: Size
    expert_intermediate_size: Size
    rms_norm_eps: Positive = 1e-5
    intermediate_size: Any = None  # of dense layers, of which there are none
    clip_qkv: Unset = None
    moe_layer_freq: Annotated[
        list[Literal[1]] | Literal[1] | None, Field(description="null, 1 and lists of 1, since all layers have experts")
    ] = None
    moe_router_enable_expert_bias: Off = None
    moe_router_score_function: Annotated[
        Literal["softmax"] | None, Field(description="null and 'softmax', the one implemented")
    ] = None
    norm_topk_prob: MaybeFlag = None  # the published code has no answer to it, and never renormalises
    qk_layernorm: On = True
    routed_scaling_factor: Annotated[
        Annotated[float, Field(ge=1.0, le=1.0)] | None, Field(description="null and 1, the one implemented")
    ] = None
    router_num_group: Unset = None
    router_topk_group: Unset = None
    shared_expert_intermediate_size: NoExperts = None


class LLaDAMoeConfig(QwenConfig):
    """LLaDA-MoE-7B-A1B-Base, -Instruct, -Instruct-TD and models of the same layers in other sizes."""

    model_type = "llada"
    table: ClassVar[type[CheckpointFields]] = LLaDAMoeFields
    bookkeeping: ClassVar[frozenset[str]] = QwenConfig.bookkeeping | EXPERTS_BOOKKEEPING | {"dense_intermediate_size"}
    published_mask_token_id: ClassVar[int] = 156895
    published_eot_token_id: ClassVar[int | None] = None
    published_vocab_sizes: ClassVar[tuple[int, ...]] = (157184,)
    qk_norm: ClassVar[bool] = True
    has_experts: ClassVar[bool] = True
    attribute_map: ClassVar[dict[str, str]] = {"moe_intermediate_size": "expert_intermediate_size"}

    def __init__(self, **given: Any) -> None:  # transformers would put one of its own in the place of an inherited one
        super().__init__(**given)

    def resolve(self, fields: Any) -> dict[str, Any]:
        """Return the numbers that fields of the table stand for, by attribute."""
        found = super().resolve(fields) | experts(
            num=fields.num_experts,
            per_token=fields.num_experts_per_tok,
            inner=fields.expert_intermediate_size,
            renormalises=False,
        )
        return {self.attribute_map.get(name, name): value for name, value in found.items()}
