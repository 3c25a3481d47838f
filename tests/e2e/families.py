"""Random LLaDA-MoE, SDAR-MoE and Stable-DiffCoder models, and the reference decoder on them."""

from pathlib import Path
from typing import Any

import torch

from tests.e2e import sdar
from tests.e2e.rig import Oracle
from tests.e2e.sdar import SdarOracle
from tests.e2e.wild import write_wild
from vllm_dllm.reference.policy import LLADA, SDAR, STABLE_DIFFCODER
from vllm_dllm.reference.qwen import Qwen, QwenConfig

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 2}

LLADA_MOE: dict[str, Any] = {
    **{name: value for name, value in sdar.CONFIG.items() if name not in ("block_size", "head_dim")},
    **EXPERTS,
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "hidden_size": 128,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "intermediate_size": None,
    "dense_intermediate_size": 512,
    "expert_intermediate_size": 48,
    "moe_layer_freq": [1, 1],
    "norm_topk_prob": None,
    "qk_layernorm": True,
    "shared_expert_intermediate_size": None,
}
SDAR_MOE: dict[str, Any] = {
    **sdar.CONFIG,
    **EXPERTS,
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
STABLE_DIFFCODER_8B: dict[str, Any] = {
    **{name: value for name, value in sdar.CONFIG.items() if name not in ("block_size", "head_dim", "pad_token_id")},
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "auto_map": {
        "AutoModel": "modeling_seed_diffcoder.SeedDiffcoderModel",
        "AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM",
    },
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 500000.0,
}


def make_random(path: Path, config: dict[str, Any], mixing: float) -> Path:
    """Write a random model, see `wild.make_wild_checkpoint`."""
    write_wild(path, config, lambda file: Qwen(QwenConfig.from_json(file)), mixing)
    return path


def oracle_of(checkpoint: Path, config: dict[str, Any]) -> Oracle:
    """Return the reference decoder of the family."""
    if config is LLADA_MOE:
        return Oracle(checkpoint, Qwen.from_pretrained(checkpoint, torch.float32), LLADA)
    return SdarOracle(checkpoint, rules=STABLE_DIFFCODER if config is STABLE_DIFFCODER_8B else SDAR)
