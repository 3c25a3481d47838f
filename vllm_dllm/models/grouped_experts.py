"""Experts in groups, chosen by sigmoid scores with a bias, beside one that all tokens have: LLaDA2's, as DeepSeek-V3's.

What chooses and what computes is vLLM's: `GateLinear` and its fused experts with a grouped top-k. Its own module of
these layers, `BailingMoE`, rounds the scores to the model's dtype before it chooses, which the published code does not.
"""

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
    `torch.topk` decides on a CPU, as in the published code.
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
            use_grouped_topk=True,
            num_expert_group=config.n_group,
            topk_group=config.topk_group,
            scoring_func="sigmoid",
            e_score_correction_bias=self.gate.expert_bias,
            routed_scaling_factor=config.routed_scaling_factor,
            router_logits_dtype=torch.float32,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [num_rows, hidden_size] to the same shape."""
        out: Tensor = self.experts(hidden_states=hidden, router_logits=hidden)  # made of these by the gate
        return out
