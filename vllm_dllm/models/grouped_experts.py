"""Experts in groups, or by blocks, chosen by sigmoid scores with a bias, beside one that all tokens have: LLaDA2's.

What chooses and what computes is vLLM's: `GateLinear` and its fused experts with a grouped top-k. Its own module of
these layers, `BailingMoE`, rounds the scores to the model's dtype before it chooses, which the published code does not.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.models.qwen3_moe import Qwen3MoeMLP


class GroupedExperts(nn.Module):
    """The feed-forward network of a layer with experts.

    A token's score of an expert is a sigmoid in float32. The bias is added to choose alone: a group scores as the sum
    of its two best experts, `topk_group` groups are kept, and of their experts the best are taken. The weights are the
    scores, scaled to add up to `routed_scaling_factor` unless there is but one. Which of equal scores are taken,
    `torch.topk` decides on a CPU, as in the published code. With `expert_capacity` there are no groups: see `by_block`.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.gate = GateLinear(
            config.hidden_size,
            config.num_experts,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        self.gate.expert_bias = nn.Parameter(torch.empty(config.num_experts, dtype=torch.float32), requires_grad=False)
        shared = None
        if config.shared_expert_intermediate_size:
            shared = Qwen3MoeMLP(
                config.hidden_size,
                config.shared_expert_intermediate_size,
                config.hidden_act,
                quant_config=vllm_config.quant_config,
                reduce_results=False,  # with the experts' results
                prefix=f"{prefix}.shared_experts",
            )
        self.shared_experts = shared
        self.experts = FusedMoEFactory(
            gate=self.gate,
            shared_experts=shared,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.num_experts_per_tok > 1,
            scoring_func="sigmoid",
            **self._routing(config),
            router_logits_dtype=torch.float32,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    def _routing(self, config: Any) -> dict[str, Any]:
        """Return what vLLM's factory needs to know of who gets which experts."""
        if config.expert_capacity is None:
            return {
                "use_grouped_topk": True,
                "num_expert_group": config.n_group,
                "topk_group": config.topk_group,
                "e_score_correction_bias": self.gate.expert_bias,
                "routed_scaling_factor": config.routed_scaling_factor,
            }
        route = partial(
            by_block,
            self.gate,
            block_size=config.block_size,
            capacity=config.expert_capacity,
            scaling=config.routed_scaling_factor,
        )
        return {"custom_routing_function": route}

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [num_rows, hidden_size] to the same shape."""
        out: Tensor = self.experts(hidden_states=hidden, router_logits=hidden)  # made of these by the gate
        return out


def by_block(
    gate: Any,
    *,
    block_size: int,
    capacity: int,
    scaling: float,
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Choose experts as LLaDA2.2 does: the rows of a block choose among the `capacity` that any of them wants most.

    The rows of a forward are whole blocks, one after another: of a prompt, of what is stored, of a canvas or of one of
    its drafts (`engine.plan`). So a block is routed by itself, whoever is beside it. Only rows of nobody, of which
    there may be any number, end with a part of one. Of equal scores the lower expert is taken.

    Args:
        gate: a module with the bias of the choice, `expert_bias` [num_experts] float32.
        block_size: rows of a block.
        capacity: experts that a block keeps.
        scaling: of the weights.
        hidden_states: vLLM's, as what follows; not looked at.
        gating_output: [num_rows, num_experts] float32, logits.
        topk: experts of a row.
        renormalize: whether its weights are made to add up to 1 before they are scaled.

    Returns: weights float32 and experts int64, two [num_rows, topk].
    """
    scores = gating_output.float().sigmoid()
    biased = scores + gate.expert_bias
    num_rows, num_experts = biased.shape
    missing = -num_rows % block_size
    blocks = torch.nn.functional.pad(biased, (0, 0, 0, missing), value=-torch.inf).view(-1, block_size, num_experts)
    order = blocks.amax(1).sort(dim=1, descending=True, stable=True).indices
    is_kept = torch.zeros(len(blocks), num_experts, dtype=torch.bool, device=biased.device)
    is_kept.scatter_(1, order[:, :capacity], value=True)
    choosable = blocks.masked_fill(~is_kept[:, None], -torch.inf).flatten(0, 1)[:num_rows]
    chosen = choosable.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    weights = scores.gather(1, chosen)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * scaling, chosen
