"""Expert parallelism on a CPU: each rank computes with its own experts and leaves the others to their ranks."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm_dllm.errors import ConfigError


def use_own_experts(model: nn.Module) -> None:
    """Have a loaded model's layers read the map from all experts to the rank's own.

    vLLM's kernel takes the number of any expert for that of one of the rank's: it reads another one's weights, or
    memory behind them all.

    Raises: ConfigError for kernels of quantised experts, which take numbers in other forms.
    """
    for layer in model.modules():
        if not isinstance(layer, RoutedExperts) or layer.expert_map is None:
            continue
        kernel: Any = layer.quant_method.moe_kernel
        experts = kernel.fused_experts if kernel is not None else None
        if not isinstance(experts, CPUUnquantizedExperts):
            raise ConfigError(
                "enable_expert_parallel is on, but on a CPU vLLM's kernels for quantised experts take all of a layer; "
                "allowed there is off; remove --enable-expert-parallel"
            )
        experts.apply = partial(_apply_own, experts.apply)


def _apply_own(apply: Any, *, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor, **more: Any) -> None:
    """Call vLLM's kernel with numbers of the rank's experts, and weights of 0 for those of others.

    Args:
        apply: vLLM's.
        topk_weights: [num_rows, num_experts_per_tok] float32.
        topk_ids: [num_rows, num_experts_per_tok] int32, of all experts.
        expert_map: [num_experts] int32, the number on this rank, or -1.
        more: of vLLM's.
    """
    own = expert_map[topk_ids]
    apply(
        topk_weights=topk_weights * (own >= 0),
        topk_ids=own.clamp(min=0),
        expert_map=None,  # applied; one that read it would do so again
        **more,
    )
