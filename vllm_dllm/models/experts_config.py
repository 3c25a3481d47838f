"""What the configurations of families with experts have in common, under the field names of Qwen3-MoE."""

from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_dllm.errors import ConfigError
from vllm_dllm.models.checkpoint_config import WHERE

NoExperts = Annotated[Literal[0] | None, Field(description="null and 0, as the model class has no shared experts")]
"""The size of shared experts."""

EXPERTS_BOOKKEEPING = frozenset({"output_router_logits", "router_aux_loss_coef"})
"""Fields of training alone."""


def experts(*, num: int, per_token: int, inner: int, renormalises: bool) -> dict[str, Any]:
    """Return the attributes that vLLM's module of experts asks for.

    Args:
        num: experts of a layer.
        per_token: how many of them a token has.
        inner: elements of the inner layer of each.
        renormalises: whether the weights of a token's experts are scaled to add up to 1.

    Raises: ConfigError where a token would have more experts than there are.
    """
    if per_token > num:
        raise ConfigError(
            f"num_experts_per_tok in {WHERE} is {per_token}, but num_experts is {num}; allowed are numbers up to it; "
            "correct one of them"
        )
    return {
        "num_experts": num,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": inner,
        "norm_topk_prob": renormalises,
        "shared_expert_intermediate_size": 0,
    }
